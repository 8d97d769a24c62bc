"""A step of an optimizer on a GPU queues its work and returns: nothing in it waits for the device.

A host that waits in a step (for ``item()``, for a copy of a Python number) leaves the device idle while it prepares the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metaopt
from metaopt import registry
from metaopt.rule import UpdateRule
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_kernels.triton_kernels import TritonKernels

SHAPES = {"embedding.weight": (9, 6), "hidden.weight": (12, 6), "conv.weight": (4, 3, 2, 2), "bias": (12,)}
LEARNED: dict[str, dict[str, Any]] = {
    "small_fc_lopt": {"hidden": 4}, "celo2": {}, "celo": {}, "velo": {"lstm_hidden": 8, "bank": 4},
}  # fmt: skip
RULES = ["adamw", "lion", *LEARNED]


class Refusal(Exception):
    """What the step did makes a host wait."""


class NoCopiesFromHost(TorchFunctionMode):
    """Refuses tensors of Python numbers on another device than the CPU, which are copied there at once."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        numbers = function in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if numbers and not isinstance(args[-1], Tensor) and not made.is_cpu:
            raise Refusal(f"{function.__name__} of {args[-1]} copies it to the device")
        return made


class NoTransfers(TorchDispatchMode):
    """Refuses operations that read or write both sides."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        sides = {leaf.is_cpu for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor) and leaf.dim()}
        if len(sides) > 1:
            raise Refusal(f"{function} has tensors on the host and on the device")
        return made


class NoReads(TorchFunctionMode):
    """Refuses to hand numbers of tensors to Python."""

    READS = (
        Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__float__,
        Tensor.__int__, Tensor.__index__, torch.nonzero, torch.equal, torch.allclose,
    )  # fmt: skip

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in self.READS:
            raise Refusal(f"{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


class NoStep:
    """An elementwise step that takes everything and does nothing."""

    def fits(self, columns: Any) -> bool:
        return True

    def __call__(self, columns: Any, coefficients: Any) -> None:
        pass


class NoKernels:
    """Takes everything and does nothing, so that the rule's own operations and the engine's are all that runs."""

    of_matrices: Mapping[str, Any] = {}

    def elementwise(self, *_: Any) -> Any:
        return NoStep()

    def reaches(self, *_: Any) -> bool:
        return True

    def network_step(self, step: Any, prepared: Any, grads: Any, params: Any, state: Any, **_: Any) -> Any:
        if step.own_finish:
            return {name: p.new_empty((1, 2, *p.shape[1:])) for name, p in params.items()}, {}
        return params, {}


def optimizer(name: str, device: torch.device) -> tuple[RuleOptimizer, Tensor]:
    """On parameters with gradients, with theta on the CPU, as it is loaded; and a loss."""
    rule: str | UpdateRule = name
    if name in LEARNED:
        learned = registry.create("learned_optimizer", name, **LEARNED[name])
        rule = learned.bind(learned.init_theta(torch.Generator().manual_seed(0)))
    named = [(key, nn.Parameter(torch.ones(shape, device=device))) for key, shape in SHAPES.items()]
    for _, p in named:
        p.grad = torch.ones_like(p)
    return metaopt.optimizer(rule, named, horizon=10, execution="fused"), torch.ones((), device=device)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with NoReads():
            yield


def steps(made: RuleOptimizer, loss: Tensor) -> None:
    """Two, the second at another learning rate, as a schedule has it."""
    made.step(loss)
    for group in made.param_groups:
        group["lr"] *= 0.9
    made.step(loss)


@pytest.mark.parametrize("name", RULES)
def test_no_rule_asks_for_numbers_or_sends_any(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaopt.execution.kernels_of", lambda _: NoKernels())
    made, loss = optimizer(name, torch.device("meta"))  # has no numbers that could be read: reading raises
    made.step(loss)  # constants and theta are copied once
    with NoTransfers(), NoCopiesFromHost():
        steps(made, loss)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", RULES)
def test_no_kernel_waits_for_the_device(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaopt.execution.kernels_of", lambda _: TritonKernels())
    if device.type == "cpu":  # the interpreter itself reads numbers
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *_, **__: None)
    made, loss = optimizer(name, device)
    steps(made, loss)  # kernels are generated, and tables are laid out that stay the same
    with no_waits(device):
        steps(made, loss)


def test_what_waits_is_refused() -> None:
    with NoReads(), pytest.raises(Refusal, match="item"):
        torch.ones(()).item()
    with NoCopiesFromHost(), pytest.raises(Refusal, match="copies"):
        torch.tensor([1.0], device="meta")
    with NoTransfers(), pytest.raises(Refusal, match="host and on the device"):
        torch.ones(2).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()
