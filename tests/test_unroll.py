"""K runs in lock-step are K runs, whatever differs between them and however they are executed."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from metaopt import registry, tree
from metaopt.rule import Chain, ElementwiseRule, UpdateRule
from metaopt.space import learning_rate
from metaopt.task import Task, stack_configs
from metaopt.unroll import Carry, start, unroll
from metaopt_classic.adam import AdamW
from metaopt_classic.wrappers import SAM, ClipByGlobalNorm
from metaopt_learned.adafac_mlp import AdafacMLP

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 through a few steps; batched matmuls sum in another order


def task_named(name: str) -> Task:
    made = registry.create("task", name)
    return made if isinstance(made, Task) else made.sample(torch.Generator().manual_seed(0))


def learned(copies: int | None) -> UpdateRule:
    rule = AdafacMLP(hidden=4, step_scale=0.01)
    thetas = [rule.init_theta(torch.Generator().manual_seed(i)) for i in range(copies or 1)]
    return rule.bind(tree.stack(thetas), stacked=True) if copies else rule.bind(thetas[0])


RULES = ["sgd", "nesterov", "adamw", "lion", "adafactor", "muon"]
TASKS = ["quadratic", "digits_mlp", "digits_conv", "char_lm"]


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("rule", [*RULES, "learned", "sam"])
@torch.no_grad()
def test_every_task_times_every_rule_equals_single_runs(task_name: str, rule: str) -> None:
    task = task_named(task_name)
    made = {"learned": learned(None), "sam": SAM(AdamW())}.get(rule) or registry.create("optimizer", rule)
    seeds = torch.tensor([5, -3, 11])
    losses, carry = unroll(task, made, start(task, made, seeds), 3, backend="eager")
    assert losses.shape == (3, 3)
    assert carry.alive.all()
    for k, seed in enumerate(seeds):
        alone, single = unroll(task, made, start(task, made, seed[None]), 3)
        torch.testing.assert_close(losses[k], alone[0], **CLOSE)
        for name, value in single.params.items():
            torch.testing.assert_close(carry.params[name][k], value[0], **CLOSE)


@torch.no_grad()
def test_hyperparameters_and_theta_may_differ_per_copy() -> None:
    task = task_named("digits_mlp")
    rule = AdamW()
    rates = torch.tensor([1e-3, 1e-2, 3e-2])
    seeds = torch.zeros(3, dtype=torch.int64)
    hp = {"lr": rates, "betas": (torch.tensor([0.9, 0.8, 0.95]), 0.99)}
    losses, _ = unroll(task, rule, start(task, rule, seeds), 5, hp=hp)
    for k in range(3):
        own = {"lr": float(rates[k]), "betas": (float(hp["betas"][0][k]), 0.99)}  # type: ignore[index]
        alone, _ = unroll(task, rule, start(task, rule, seeds[:1]), 5, hp=own)
        torch.testing.assert_close(losses[k], alone[0], **CLOSE)
    many = learned(3)
    losses, _ = unroll(task, many, start(task, many, seeds), 5)
    for k in range(3):
        one = many.learned.bind(tree.index(many.theta, k))  # type: ignore[attr-defined]
        alone, _ = unroll(task, one, start(task, one, seeds[:1]), 5)
        torch.testing.assert_close(losses[k], alone[0], **CLOSE)


@torch.no_grad()
def test_members_of_a_family_run_side_by_side() -> None:
    family = registry.create("task", "quadratic", dim=6)
    members = [family.sample(torch.Generator().manual_seed(i)) for i in range(3)]
    rule = registry.create("optimizer", "momentum", lr=1e-3)
    seeds = torch.arange(3)
    losses, _ = unroll(members[0], rule, start(members[0], rule, seeds, config=stack_configs(members)), 4)
    for k, member in enumerate(members):
        alone, _ = unroll(member, rule, start(member, rule, seeds[k : k + 1]), 4)
        torch.testing.assert_close(losses[k], alone[0], **CLOSE)


@torch.no_grad()
def test_two_windows_equal_one_long_window_to_the_bit() -> None:
    task, rule = task_named("digits_mlp"), AdamW()
    begin = start(task, rule, torch.arange(4))
    whole, end = unroll(task, rule, begin, 6)
    first, middle = unroll(task, rule, begin, 4)
    second, again = unroll(task, rule, Carry.from_tree(middle.tree()), 2)
    assert torch.equal(whole, torch.cat([first, second], 1))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(end.tree()), tree.leaves(again.tree()), strict=True))


@torch.no_grad()
def test_diverged_copy_is_frozen_reported_and_touches_no_other() -> None:
    task, rule = task_named("quadratic"), registry.create("optimizer", "sgd")
    seeds = torch.arange(4)
    rates = torch.tensor([1e-3, 1e30, 1e-3, 1e-2])
    losses, carry = unroll(task, rule, start(task, rule, seeds), 8, hp={"lr": rates})
    assert carry.alive.tolist() == [True, False, True, True]
    assert torch.isnan(losses[1]).any()
    assert int(carry.step[1]) < 8
    assert all(torch.isfinite(leaf).all() for leaf in carry.params.values()), "frozen where it was last finite"
    for k in (0, 2, 3):
        alone, _ = unroll(task, rule, start(task, rule, seeds[k : k + 1]), 8, hp={"lr": rates[k : k + 1]})
        torch.testing.assert_close(losses[k], alone[0], **CLOSE)


def test_meta_gradient_through_an_unroll_equals_finite_differences() -> None:
    task = registry.create("task", "quadratic", dim=3).sample(torch.Generator().manual_seed(1))
    rule = AdamW()

    def final_loss(log_lr: torch.Tensor) -> torch.Tensor:
        begin = start(task, rule, torch.arange(2))
        begin.params = {name: value.double() for name, value in begin.params.items()}
        begin.state = tree.map_tree(lambda s: s.double() if s.is_floating_point() else s, begin.state)
        begin.config = {name: value.double() for name, value in begin.config.items()}
        losses, _ = unroll(task, rule, begin, 6, hp={"lr": log_lr.exp()})
        return losses[:, -1].sum()

    at = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(final_loss(at), at)
    h = 1e-5
    with torch.no_grad():
        numeric = (final_loss(at + h) - final_loss(at - h)) / (2 * h)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("rule", "task_name"), [("adamw", "digits_mlp"), ("learned", "quadratic")])
@torch.no_grad()
def test_compiled_back_end_gives_the_same_numbers(rule: str, task_name: str) -> None:
    task = task_named(task_name)
    made = learned(2) if rule == "learned" else registry.create("optimizer", rule)
    begin = start(task, made, torch.arange(2))
    hp: dict[str, Any] = {"lr": torch.tensor([1e-2, 1e-3])} if rule == "adamw" else {}
    eager, end = unroll(task, made, begin, 5, hp=hp, backend="eager")
    compiled, compiled_end = unroll(task, made, begin, 5, hp=hp, backend="compile")
    torch.testing.assert_close(compiled, eager, **CLOSE)
    for name in end.params:
        torch.testing.assert_close(compiled_end.params[name], end.params[name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_rules_that_differ_in_a_plain_field_or_in_nested_theta_do_not_share_a_step() -> None:
    class Fixed(ElementwiseRule):
        lr: float = learning_rate(0.1, search=(0.01, 1.0))
        power: int = 1  # neither declared as an option nor as a hyperparameter

        def elementwise(self, param: Any, grad: Any, lr: Any) -> Any:
            return param - lr * grad**self.power

    task, seeds = task_named("quadratic"), torch.arange(2)

    def last_loss(rule: UpdateRule) -> torch.Tensor:
        return unroll(task, rule, start(task, rule, seeds), 3)[0][:, -1]

    assert not torch.equal(last_loss(Fixed(lr=1e-4)), last_loss(Fixed(lr=1e-4, power=2)))
    rule = AdafacMLP(hidden=4, step_scale=0.01)
    thetas = [rule.init_theta(torch.Generator().manual_seed(i)) for i in range(2)]
    wrapped = [last_loss(Chain(ClipByGlobalNorm(), rule.bind(theta))) for theta in thetas]
    assert not torch.equal(*wrapped)
    stacked = Chain(ClipByGlobalNorm(), rule.bind(tree.stack(thetas), stacked=True))
    with pytest.raises(ValueError, match="Chain holds a learned rule bound to one theta per copy"):
        start(task, stacked, seeds)


def test_bad_input_is_refused_in_one_sentence() -> None:
    task, rule = task_named("quadratic"), AdamW()
    begin = start(task, rule, [1, 2])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        unroll(task, rule, begin, 0)
    with pytest.raises(TypeError, match="AdamW has no hyperparameter 'rate'"):
        unroll(task, rule, begin, 1, hp={"rate": 1.0})
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got -1"):
        unroll(task, rule, begin, 1, hp={"lr": torch.tensor([1.0, -1.0])})
    with pytest.raises(ValueError, match=r"one per copy \[2\], got shape \(3,\)"):
        unroll(task, rule, begin, 1, hp={"lr": torch.ones(3)})
    with pytest.raises(ValueError, match="non-empty vector"):
        start(task, rule, [])
    with pytest.raises(ValueError, match="backend"):
        unroll(task, rule, begin, 1, backend="fast")
