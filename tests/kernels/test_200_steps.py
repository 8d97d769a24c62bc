"""The fused unroll equals eager over 200 steps of the digits MLP, in C++ and in Triton, for five kinds of rules.

In float32 two orders of summation part ways, so both are held against torch in float64. With the error of a run the largest
difference of a loss so far, at every step:

- the median error of fused runs is at most 4 times that of eager runs plus 1e-6 (five roundings of a loss of 2);
- no fused run's error is more than 4 times that of the same run in eager plus a ``turn``. One weight's sign in Lion, and one
  unit of a ReLU in any rule, may fall to the other side where a number is within rounding of 0, and the run takes another turn.
  AdamW's and SGD's losses hardly show it; Lion's and learned rules' do: of 32 runs in C++ the median error is 1e-6 to 2e-5, the
  largest 4e-4 to 6e-4, but for one run of ``small_fc_lopt`` that strays by 2e-2, in eager as in C++.

Likewise for the mean error of a parameter in the end. In C++ the network is 64-32-10 and a batch 64, as the task has them; in
the interpreter, where a step of a learned rule takes 0.15 s, they are 64-4-10 and 8.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_unroll import unrolled_by_torch

from metaopt import registry, tree
from metaopt.cpp_kernels import CppKernels
from metaopt.perparameter import PerParameterRule
from metaopt.program import compiler
from metaopt.rule import UpdateRule
from metaopt.task import Split
from metaopt.unroll import Carry, start, unroll
from metaopt_tasks.mlp import MLPClassifier, mlp_classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # NumPy's
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]

STEPS = 200
ELEMENTWISE: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
    "lion": {"lr": 0.001, "weight_decay": 0.1},
    "sgd": {"lr": 0.02, "momentum": 0.9},
}
LEARNED: dict[str, dict[str, Any]] = {
    "small_fc_lopt": {"lr": 5.0, "hidden": 4},
    "celo2_base": {"lr": 0.005},
}
RULES = [*ELEMENTWISE, *LEARNED]
TURN = {"adamw": 1e-6, "sgd": 1e-6, "lion": 1e-3, "small_fc_lopt": 1e-3, "celo2_base": 1e-3}


def rule_of(name: str, dtype: torch.dtype, device: torch.device) -> UpdateRule:
    """Learned ones are random, but for two units of each layer that pass m_1 r, Adam's direction, on to the step."""
    if name in ELEMENTWISE:
        made: UpdateRule = registry.create("optimizer", name, **ELEMENTWISE[name])
        return made
    learned: PerParameterRule = registry.create("learned_optimizer", name, **LEARNED[name])
    theta, features = learned.init_theta(torch.Generator().manual_seed(0)), learned.features
    direction = sum(map(features.planes, features.blocks[: features.blocks.index("m_r")]))
    signs = torch.tensor([1.0, -1.0])
    theta["w0"][:, :2], theta["w1"][:, :2] = 0, 0
    theta["w0"][direction, :2], theta["w1"][:2, :2], theta["w2"][:2, 0] = signs, torch.eye(2), signs
    return learned.bind(as_dtype(theta, dtype)).to(device)


def as_dtype(values: Any, dtype: torch.dtype) -> Any:
    return tree.map_tree(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, values)


def trained(
    backend: str, name: str, task: MLPClassifier, copies: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [K, T] and parameters of runs from the same seeds, begun in float32."""
    rule = rule_of(name, dtype, task.device)
    carry = Carry.from_tree(as_dtype(start(task, rule, list(range(copies))).tree(), dtype))
    task.train = Split(as_dtype(dict(task.train.tensors), dtype))
    with torch.no_grad():
        if backend == "torch":
            losses, end = unrolled_by_torch(task, rule, carry, STEPS)
        else:
            losses, end = unroll(task, rule, carry, STEPS, backend=backend)
    return losses, end.params


def assert_equals_eager(name: str, copies: int, **options: Any) -> None:
    """See the module."""
    made, eager, exact = (
        trained(backend, name, mlp_classifier(**options), copies, dtype)
        for backend, dtype in (("fused", torch.float32), ("torch", torch.float32), ("torch", torch.float64))
    )
    assert exact[0][:, -20:].mean() < 0.8 * exact[0][:, :20].mean()  # it learns
    for found, wanted in zip(errors(made, exact), errors(eager, exact), strict=True):
        assert (found.median(0).values <= 4 * wanted.median(0).values + 1e-6).all()
        assert (found <= 4 * wanted + TURN[name]).all()


def errors(found: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of every run: of losses so far [K, T], and of each parameter in the end, on average over its entries [K, parameters]."""
    of_params = [(found[1][name] - p).abs().flatten(1).mean(1) for name, p in exact[1].items()]
    return (found[0] - exact[0]).abs().cummax(1).values, torch.stack(of_params, 1)


class Witness:
    """Kernels, and the names of those that made something."""

    def __init__(self, kernels: Any, made: set[str]) -> None:
        self.kernels, self.made = kernels, made

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.kernels, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any, **options: Any) -> Any:
            done = attribute(*arguments, **options)
            self.made.update([] if done is None else [name])
            return done

        return call


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", RULES)
def test_in_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[str] = set()
    monkeypatch.setattr(sys.modules["metaopt.unroll"], "kernels_of", lambda _: Witness(CppKernels(), made))
    assert_equals_eager(name, copies=7)
    assert made >= ({"dense_unroll"} if name in ELEMENTWISE else {"dense_gradients", "network_step"})


@pytest.mark.parametrize("name", RULES)
def test_in_triton(name: str, windows: list[int], device: torch.device) -> None:
    in_interpreter = device.type == "cpu"
    options = {"hidden": (4,), "batch_size": 8} if in_interpreter else {}
    assert_equals_eager(name, copies=1 if in_interpreter else 7, device=device, **options)
    assert windows == [STEPS]
