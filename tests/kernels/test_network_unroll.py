"""The fused unroll of a learned rule trains as torch does, but for the order of float32 sums.

Features are divided by their root mean squares and networks are random, so that a step changes a parameter by 1e-4 and more;
over a few steps rounding leaves 1e-6. Over 200 steps: `test_200_steps`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_unroll import unrolled_by_torch

from metaopt import registry, tree
from metaopt.dense.network import DenseNetwork
from metaopt.learned import BoundRule, Theta
from metaopt.perparameter import PerParameterRule, Prepared
from metaopt.rule import Context, HyperValues, Params, State
from metaopt.unroll import Carry, start, unroll
from metaopt_kernels.network_unroll import network_unroll
from metaopt_kernels.triton_kernels import TritonKernels
from metaopt_learned.celo2 import Celo2Base
from metaopt_learned.mlp_lopt import MLPLOpt
from metaopt_tasks.mlp import MLPClassifier, mlp_classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # NumPy's
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]


class Scheduled(MLPLOpt):
    """Steps shrink towards the horizon."""

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        prepared = super().prepare(theta, state, params, hp, ctx)
        assert ctx.step is not None and isinstance(ctx.horizon, Tensor)
        left = 1 - ctx.step / ctx.horizon
        return prepared._replace(scale={name: value * left for name, value in prepared.scale.items()})


class Sized(MLPLOpt):
    """Steps follow the size of the tensor, which nobody knows ahead."""

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        prepared = super().prepare(theta, state, params, hp, ctx)
        scale = {name: value * params[name].square().mean().sqrt() for name, value in prepared.scale.items()}
        return prepared._replace(scale=scale)


class Halved(Celo2Base):
    """Another finish."""

    def finish(self, outputs: Tensor, param: Tensor, *rest: Any) -> Tensor:
        return 0.5 * super().finish(outputs, param, *rest)


def digits(device: torch.device) -> MLPClassifier:
    return mlp_classifier(hidden=(5,), batch_size=6, device=device)


def drawn(learned: PerParameterRule, device: torch.device) -> BoundRule:
    """The rule bound to a theta for each of two copies."""
    generator = torch.Generator().manual_seed(0)
    thetas = [learned.init_theta(generator) for _ in range(2)]
    stacked = {leaf: torch.stack([one[leaf] for one in thetas]) for leaf in thetas[0]}
    return learned.bind(stacked, stacked=True).to(device)


def begun(task: MLPClassifier, rule: BoundRule) -> Carry:
    """Two runs of which one has made two steps, the other says that it has made forty."""
    with torch.no_grad():
        _, carry = unrolled_by_torch(task, rule, start(task, rule, [0, 1]), 2)
    carry.step[1] += 38
    return carry


@pytest.mark.parametrize(
    "learned",
    [
        registry.create("learned_optimizer", "small_fc_lopt", hidden=4, weight_decay=0.1),
        Scheduled(hidden=16),
        registry.create("learned_optimizer", "celo2_base", magnitude_scale=0.1, weight_decay=0.1),
    ],
    ids=["factored", "scheduled", "normalised"],
)
def test_copies_of_different_theta_lr_time_and_horizon_train_as_by_torch(
    learned: PerParameterRule, windows: list[int], device: torch.device
) -> None:
    task, rule = digits(device), drawn(learned, device)
    carry = begun(task, rule)
    before = tree.map_tree(Tensor.clone, carry.tree())
    lr = rule.hp["lr"] * torch.tensor([1.0, 3.0], dtype=torch.float64, device=device)
    options: dict[str, Any] = {"hp": {"lr": lr}, "horizon": torch.tensor([8, 100], device=device)}
    with torch.no_grad():
        losses, end = unroll(task, rule, carry, 3, backend="fused", **options)
        wanted, wanted_end = unrolled_by_torch(task, rule, carry, 3, **options)
    assert windows == [3]
    torch.testing.assert_close(carry.tree(), before, rtol=0, atol=0)
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
    for name, p in wanted_end.params.items():
        assert (p - carry.params[name]).flatten(1).abs().amax(1).min() > 1e-4
        torch.testing.assert_close(end.params[name], p, rtol=0, atol=1e-6)
    torch.testing.assert_close(end.tree(), wanted_end.tree(), rtol=1e-5, atol=1e-6)


def test_one_theta_for_all_copies(windows: list[int], device: torch.device) -> None:
    task, learned = digits(device), MLPLOpt(hidden=4)
    rule = learned.bind(learned.init_theta(torch.Generator().manual_seed(0))).to(device)
    carry = start(task, rule, [0, 1])
    with torch.no_grad():
        losses, end = unroll(task, rule, carry, 1, backend="fused")
        wanted, wanted_end = unrolled_by_torch(task, rule, carry, 1)
    assert windows == [1]
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(end.tree(), wanted_end.tree(), rtol=1e-5, atol=1e-6)


def test_a_copy_that_diverges_ends_as_by_torch_and_touches_no_other(windows: list[int], device: torch.device) -> None:
    task, rule = digits(device), drawn(MLPLOpt(hidden=4), device)
    rule.theta["b2"][1, 0] = 1e30  # the direction
    carry = start(task, rule, [0, 1])
    with torch.no_grad():
        losses, end = unroll(task, rule, carry, 3, backend="fused")
        wanted, wanted_end = unrolled_by_torch(task, rule, carry, 3)
    assert windows == [3]
    assert end.alive.tolist() == wanted_end.alive.tolist() == [True, False]
    assert end.step.tolist() == wanted_end.step.tolist() and wanted_end.step[1] < 3
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(end.params, wanted_end.params, rtol=1e-4, atol=1e-6)


def test_a_rule_that_says_so_but_does_not_prepare_ahead_is_found_out(windows: list[int], device: torch.device) -> None:
    task, rule = digits(device), drawn(Sized(hidden=4), device)
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        unroll(task, rule, start(task, rule, [0, 1]), 2, backend="fused")


@pytest.mark.parametrize(
    ("name", "ahead"), [("small_fc_lopt", True), ("mulo", True), ("celo2", False), ("celo", False), ("velo", False)]
)
def test_windows_are_offered_of_rules_whose_network_steps_all_and_that_prepare_ahead(name: str, ahead: bool) -> None:
    learned: PerParameterRule = registry.create("learned_optimizer", name)
    assert learned.prepares_all_ahead(digits(torch.device("cpu")).info()) == ahead


# -- the kernel by itself ----------------------------------------------------------------------------------------------


def ran(rule: BoundRule, task: MLPClassifier, carry: Carry, steps: int) -> Any:
    """From the first examples on."""
    dense, train, learned = task.dense, task.train.tensors, rule.learned
    assert dense is not None and isinstance(learned, PerParameterRule)
    dims = (0, dict.fromkeys(rule.hp))
    ctx = Context(task.info(), step=carry.step, horizon=carry.step + 100)
    prepare = partial(learned.prepare_window, rule.theta, carry.params, rule.hp, ctx, dims, steps)
    indices = torch.arange(2 * steps * 6, device=task.device).view(2, steps, 6)
    given = (carry.params, carry.state, train[dense.inputs].flatten(1), train[dense.target], indices)
    return network_unroll(dense, learned.kernel_step, prepare, *given)


def test_nan_stays_in_its_copy_and_is_flagged(device: torch.device) -> None:
    task, rule = digits(device), drawn(MLPLOpt(hidden=4), device)
    carry = start(task, rule, [0, 1])
    clean = ran(rule, task, carry, 2)
    carry.params["fc2.bias"][1, 0] = torch.nan
    losses, params, _, finite = ran(rule, task, carry, 2)
    assert finite.tolist() == [True, False]
    assert torch.equal(losses[0], clean[0][0])
    torch.testing.assert_close(tree.index(params, 0), tree.index(clean[1], 0), rtol=0, atol=0)


@pytest.mark.parametrize(
    "learned", [Halved(), Celo2Base(param_scale=True), registry.create("learned_optimizer", "orthogonal_mlp")]
)
def test_rules_with_another_finish_are_left_to_others_and_prepare_nothing(
    learned: PerParameterRule, device: torch.device
) -> None:
    task = digits(device)
    dense, train = task.dense, task.train.tensors
    assert isinstance(dense, DenseNetwork)
    carry = start(task, drawn(learned, device), [0, 1])
    examples = (
        train[dense.inputs].flatten(1),
        train[dense.target],
        torch.zeros(2, 1, 6, dtype=torch.int64, device=device),
    )
    found = TritonKernels().network_unroll(
        dense, learned.kernel_step, pytest.fail, carry.params, carry.state, *examples
    )  # fmt: skip
    assert found is None
