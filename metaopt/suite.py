"""Suites of named tasks: what belongs to one, what it contains to the last number, and which one is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt import registry
from metaopt.random import uniform
from metaopt.task import Split, Task

HELD_OUT = "test"
"""The suite that no search, tuning of a search, or meta-training may use."""


def suites() -> dict[str, list[str]]:
    """Suite -> names of its tasks, both sorted."""
    found: dict[str, list[str]] = {}
    for name, spec in registry.specs("task").items():
        if spec.facts.get("suite"):
            found.setdefault(spec.facts["suite"], []).append(name)
    return dict(sorted(found.items()))


def members(suite: str) -> list[str]:
    """Names of the suite's tasks.

    Raises:
        ValueError: no such suite.
    """
    known = suites()
    if suite not in known:
        raise ValueError(f"no suite is called {suite!r}; there are {', '.join(known)}")
    return known[suite]


_SUITE = "suite:"


def listed(names: Iterable[str]) -> list[str]:
    """Task names, with every ``suite:NAME`` replaced by the suite's tasks; empty ones are dropped."""
    expanded: list[str] = []
    for name in names:
        expanded += members(name.removeprefix(_SUITE)) if name.startswith(_SUITE) else [name] if name else []
    return expanded


def refuse_held_out(names: Iterable[str], purpose: str) -> None:
    """Raise ``ValueError`` if a task is of the held-out suite: what was searched on it could not be judged by it."""
    for name in names:
        spec = registry.specs("task").get(name)
        if spec is not None and spec.facts.get("suite") == HELD_OUT:
            raise ValueError(
                f"{name} belongs to the held-out suite {HELD_OUT!r}, on which results are judged, so it cannot be used "
                f"for {purpose}; choose a task of another suite (metaopt list tasks)"
            )


def refuse_held_out_data(sources: Iterable[Any], purpose: str) -> None:
    """Raise ``ValueError`` if a data source is one that only tasks of the held-out suite use."""
    specs = registry.specs("task").values()
    held = {s for spec in specs if spec.facts.get("suite") == HELD_OUT for s in spec.facts.get("data", "").split(", ")}
    for source in sources:
        if source and source in held:
            raise ValueError(
                f"data source {source!r} is held out for the suite {HELD_OUT!r}, so it cannot be used for {purpose}; "
                f"choose another (metaopt list data-sources)"
            )


def content_hash(task: Task) -> str:
    """Twelve hex digits that change when a task's data, architecture or settings do.

    Integers count exactly; floating-point data by three rounded statistics (one depends on the order), so that
    processors whose last bits differ agree.
    """
    return _digest(_described(task))


def suite_hash(contents: Mapping[str, str]) -> str:
    """Twelve hex digits for a set of tasks, name -> `content_hash`, whatever their order."""
    return _digest(dict(contents))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _described(value: Any) -> Any:
    if isinstance(value, Task):
        params = {name: list(p.shape) for name, p in value.init(torch.Generator().manual_seed(0)).items()}
        settings = {f.name: _described(getattr(value, f.name, None)) for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, "params": params, **settings}
    if isinstance(value, Split):
        rest = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "tensors"}
        return {"class": type(value).__qualname__, "tensors": _described(value.tensors), **rest}
    if isinstance(value, Tensor):
        return _statistics(value.detach().cpu())
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, (str, int)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _statistics(value: Tensor) -> list[Any]:
    kind = [str(value.dtype), list(value.shape)]
    if not value.is_floating_point():
        return [*kind, hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()]
    flat = value.double().flatten()
    std = float(flat.std()) if len(flat) > 1 else 0.0
    scale = std or 1.0
    order = uniform(torch.tensor(0), flat.shape, dtype=torch.float64) - 0.5
    return [
        *kind,
        f"{std:.3g}",
        *(round(float(part) / scale, 3) + 0.0 for part in (flat.mean(), (flat * order).mean())),
    ]
