"""The fused unroll of a learned rule trains as the eager back-end does, but for the order of float32 sums.

Features are divided by their root mean squares and networks are random, so that a step changes a parameter by 1e-4 and more;
over a few steps rounding leaves 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import registry, tree
from metaopt.learned import BoundRule
from metaopt.perparameter import PerParameterRule
from metaopt.perparameter.prepared import Prepared
from metaopt.random import sample_indices
from metaopt.rule import Context
from metaopt.unroll import Carry, start, unroll
from metaopt_kernels.network_unroll import network_unroll
from metaopt_learned.celo2 import NORM_EPS
from metaopt_tasks.mlp import MLPClassifier, mlp_classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # NumPy's
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]


def prepared_for(rule: BoundRule, task: MLPClassifier, carry: Carry, steps: int) -> Prepared:
    """What the rule prepares for each step, with leading dimensions T and K."""
    learned, copies = rule.learned, len(carry.seeds)
    assert isinstance(learned, PerParameterRule)
    windows: list[Prepared] = []
    for t in range(steps):
        state = {name: {"step": slots["step"] + t} for name, slots in carry.state.items()}
        loss = torch.zeros(copies, device=task.device)
        ctx = Context(task.info(), step=carry.step + t, loss=loss, horizon=carry.step + 100)
        dims = (0, dict.fromkeys(rule.hp))
        windows.append(learned._prepare_copies(rule.theta, state, carry.params, rule.hp, ctx, dims))
    leaves = [list(leaves_of(window)) for window in windows]
    stacked = iter([torch.stack(column) for column in zip(*leaves, strict=True)])
    return windows[0].map(lambda _: next(stacked))


def leaves_of(prepared: Prepared) -> list[Tensor]:
    found: list[Tensor] = []

    def take(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    prepared.map(take)
    return found


def drawn(name: str, options: dict[str, Any], device: torch.device) -> tuple[BoundRule, MLPClassifier, Carry, Tensor]:
    """A rule bound to two thetas, a task, two runs of it that have begun, and rows for three more steps."""
    learned: PerParameterRule = registry.create("learned_optimizer", name, **options)
    generator = torch.Generator().manual_seed(0)
    thetas = [learned.init_theta(generator) for _ in range(2)]
    rule = learned.bind(
        {leaf: torch.stack([one[leaf] for one in thetas]).to(device) for leaf in thetas[0]}, stacked=True
    )
    task = mlp_classifier(hidden=(5,), batch_size=6, device=device)
    carry = start(task, rule, [0, 1])
    with torch.no_grad():
        _, carry = unroll(task, rule, carry, 2, backend="eager")
    rows = [sample_indices(carry.seeds, carry.step + t, task.batch_size, len(task.train)) for t in range(3)]
    return rule, task, carry, torch.stack(rows, 1)


def ran(rule: BoundRule, task: MLPClassifier, carry: Carry, indices: Tensor, **options: Any) -> Any:
    dense, train = task.dense, task.train.tensors
    assert dense is not None and isinstance(rule.learned, PerParameterRule)
    prepared = prepared_for(rule, task, carry, indices.shape[1])
    given = (carry.params, carry.state, train[dense.inputs].flatten(1), train[dense.target], indices)
    return network_unroll(dense, rule.learned.kernel_step, prepared, *given, **options)


@pytest.mark.parametrize(
    ("name", "options", "direction_eps"),
    [
        ("small_fc_lopt", {"hidden": 4}, None),
        ("mlp_lopt", {"hidden": 16}, None),
        ("celo2_base", {"magnitude_scale": 0.1}, NORM_EPS),
    ],
)
def test_a_learned_rule_trains_as_in_eager(
    name: str, options: dict[str, Any], direction_eps: float | None, device: torch.device
) -> None:
    rule, task, carry, indices = drawn(name, options, device)
    before = tree.map_tree(Tensor.clone, carry.tree())
    losses, params, slots, finite = ran(rule, task, carry, indices, direction_eps=direction_eps)
    torch.testing.assert_close(carry.tree(), before, rtol=0, atol=0)
    with torch.no_grad():
        wanted, end = unroll(task, rule, carry, indices.shape[1], backend="eager")
    assert finite.tolist() == [True, True]
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
    for name, p in end.params.items():
        assert (p - carry.params[name]).abs().max() > 1e-4
        torch.testing.assert_close(params[name], p, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            slots[name], {slot: end.state[name][slot] for slot in slots[name]}, rtol=1e-5, atol=1e-6
        )


def test_one_step(device: torch.device) -> None:
    rule, task, carry, indices = drawn("mlp_lopt", {"hidden": 4}, device)
    whole, one = (ran(rule, task, carry, rows)[0] for rows in (indices, indices[:, :1]))
    assert torch.equal(whole[:, :1], one)


def test_nan_stays_in_its_copy_and_is_flagged(device: torch.device) -> None:
    rule, task, carry, indices = drawn("mlp_lopt", {"hidden": 4}, device)
    clean = ran(rule, task, carry, indices)
    carry.params["fc2.bias"][1, 0] = torch.nan
    losses, params, _, finite = ran(rule, task, carry, indices)
    assert finite.tolist() == [True, False]
    assert torch.equal(losses[0], clean[0][0])
    torch.testing.assert_close(tree.index(params, 0), tree.index(clean[1], 0), rtol=0, atol=0)


def test_rules_with_another_finish_or_a_memory_are_left_to_others(device: torch.device) -> None:
    rule, task, carry, indices = drawn("celo2_base", {}, device)
    assert ran(rule, task, carry, indices) is None  # whose finish was not named
    rule, task, carry, indices = drawn("mlp_lopt", {"hidden": 4}, device)
    assert ran(rule, task, carry, indices, direction_eps=1e-9) is None
