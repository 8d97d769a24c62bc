"""Whole windows by kernels are what steps by torch are: `fused` against `eager` without kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_unroll import unrolled_by_torch

from metaopt import registry, tree
from metaopt.program import compiler
from metaopt.task import Task
from metaopt.unroll import Carry, start, unroll

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

RULES = ["adamw", "lion", "sgd"]


@pytest.fixture
def digits() -> Task:
    task: Task = registry.create("task", "digits_mlp")
    return task


def assert_same(made: Any, expected: Any, atol: float, rtol: float = 0.0) -> None:
    (losses, carry), (wanted, end) = made, expected
    torch.testing.assert_close(losses, wanted, rtol=rtol, atol=atol, equal_nan=True)
    for name, p in end.params.items():
        torch.testing.assert_close(carry.params[name], p, rtol=rtol, atol=atol, equal_nan=True)
    for name, slots in end.state.items():
        for slot, value in slots.items():
            torch.testing.assert_close(carry.state[name][slot], value, rtol=rtol, atol=atol)
    assert torch.equal(carry.alive, end.alive) and torch.equal(carry.step, end.step)


@pytest.mark.parametrize("rule", RULES)
def test_a_fused_window_is_that_of_torch(digits: Task, rule: str) -> None:
    """In double precision, over 200 steps: rounding times what training amplifies it by."""
    made = registry.create("optimizer", rule, **({"momentum": 0.9} if rule == "sgd" else {}))
    wide = tree.map_tree(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, dict(digits.train.tensors))
    digits.train = type(digits.train)(wide)
    with torch.no_grad():
        carry = start(digits, made, torch.arange(3))
        carry = Carry.from_tree(
            tree.map_tree(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, carry.tree())
        )
        hp = {"lr": torch.tensor([1e-3, 3e-4, 1e-4])}
        found = unroll(digits, made, carry, 200, hp=hp, horizon=200, backend="fused")
        assert_same(found, unrolled_by_torch(digits, made, carry, 200, hp=hp, horizon=200), 1e-9)


def test_windows_go_on_where_others_ended(digits: Task) -> None:
    """t is counted on, and a copy's batches are those of its steps."""
    rule = registry.create("optimizer", "adamw")
    with torch.no_grad():
        carry = start(digits, rule, torch.tensor([4, 5]))
        whole, end = unroll(digits, rule, carry, 12, backend="fused")
        first, middle = unroll(digits, rule, carry, 5, backend="fused")
        rest, last = unroll(digits, rule, middle, 7, backend="fused")
    assert torch.equal(torch.cat([first, rest], 1), whole)
    assert all(torch.equal(last.params[name], p) for name, p in end.params.items())


def test_a_copy_that_diverges_is_frozen_as_by_torch_and_touches_no_other(digits: Task) -> None:
    rule = registry.create("optimizer", "sgd")
    hp = {"lr": torch.tensor([0.1, 1e30, 0.1])}
    with torch.no_grad():
        carry = start(digits, rule, torch.tensor([0, 1, 2]))
        made = unroll(digits, rule, carry, 30, hp=hp, backend="fused")
        expected = unrolled_by_torch(digits, rule, carry, 30, hp=hp)
        alone = unroll(digits, rule, start(digits, rule, torch.tensor([2])), 30, hp={"lr": 0.1}, backend="fused")
        later = unroll(digits, rule, made[1], 5, hp=hp, backend="fused")
    assert made[1].alive.tolist() == [True, False, True] and made[0][1].isnan().any()
    assert_same(made, expected, 1e-4, 1e-3)  # parameters of 1e25
    assert torch.equal(alone[0][0], made[0][2])
    assert later[0][1].isnan().all() and later[1].step[1] == made[1].step[1]
    assert torch.equal(later[1].params["fc1.weight"][1], made[1].params["fc1.weight"][1])


def test_what_no_kernel_takes_runs_as_eager() -> None:
    """A task that is no dense network, a rule that is not elementwise, and steps that are recorded."""
    task, adamw = registry.create("task", "zakharov_6d"), registry.create("optimizer", "adamw")
    digits, muon = registry.create("task", "digits_mlp"), registry.create("optimizer", "muon")
    with torch.no_grad():
        for one, rule in ((task, adamw), (digits, muon)):
            carry = start(one, rule, torch.arange(2))
            made, expected = (unroll(one, rule, carry, 3, backend=b)[0] for b in ("fused", "eager"))
            assert torch.equal(made, expected)
    lr = torch.tensor(1e-3, requires_grad=True)
    losses, _ = unroll(digits, adamw, start(digits, adamw, torch.arange(2)), 3, hp={"lr": lr}, backend="fused")
    assert torch.autograd.grad(losses.sum(), lr)[0] != 0
