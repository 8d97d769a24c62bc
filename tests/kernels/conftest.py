"""Whole windows by Triton, wherever it runs, and an interpreter that is twice as quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def prepared_once() -> Iterator[None]:
    """Triton's interpreter lists its language at every call of a device function; once in a launch does, in half the time."""
    if "triton.runtime.interpreter" not in sys.modules:  # on a GPU, or without Triton
        yield
        return
    interpreter: Any = sys.modules["triton.runtime.interpreter"]
    prepare: Callable[..., Any] = interpreter._patch_lang
    scope, prepared = None, set[str]()

    def once(function: Any) -> Any:
        nonlocal scope
        module = function.__globals__["__name__"]
        if scope is None or not scope._changes:  # a launch begins: the one before took its changes back
            scope = prepare(function)
            prepared.clear()
        elif module not in prepared:
            prepare(function)
        prepared.add(module)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Back-end ``fused`` runs Triton wherever it is; gets the number of steps of every window that one launch made."""
    from metaopt_kernels.triton_kernels import TritonKernels  # not every test here needs Triton

    made: list[int] = []

    def counted(done: Any) -> Any:
        made.extend([] if done is None else [done[0].shape[1]])
        return done

    class Counted(TritonKernels):
        def dense_unroll(self, *arguments: Any) -> Any:
            return counted(super().dense_unroll(*arguments))

        def network_unroll(self, *arguments: Any) -> Any:
            return counted(super().network_unroll(*arguments))

    monkeypatch.setattr(sys.modules["metaopt.unroll"], "kernels_of", lambda kind: Counted())
    return made
