"""Runs in lock-step are the runs that the unroll makes, whatever runs beside them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metaopt import registry
from metaopt.evaluate import split_losses
from metaopt.program.build import compiler
from metaopt.program.population import encode
from metaopt.program.program import Program
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_symbolic import evaluate
from metaopt_symbolic.evaluate import Runs, schedule, train
from metaopt_symbolic.genome import SEEDS, from_rule, parse

EXPLODES = """\
def train(w, g, m, lr):
    update = mul(w, -1e9)
    m = interpolate(g, m, 0.9)
    return update, m
"""
LATE_NAN = """\
def train(w, g, m, lr, t):
    late = gt(t, 30.0)
    bad = where(late, nan, 0.01)
    update = mul(g, bad)
    m = interpolate(g, m, 0.9)
    return update, m
"""
NORMED = """\
def train(w, g, m, lr):
    length = norm(g)
    clipped = clip_by_global_norm(g, 1.0)
    m = interpolate(clipped, m, 0.9)
    update = div(m, length)
    rate = mul(lr, 0.01)
    update = mul(update, rate)
    return update, m
"""


def program(text: str) -> Program:
    return parse(text).program()


def digits(**options: Any) -> Task:
    return registry.create("task", "digits_mlp", **{"hidden": (8,), "batch_size": 16, **options})


def runs_of(task: Task, *programs: Program, horizon: int = 40, **options: Any) -> Runs:
    return train(task, encode(programs), horizon=horizon, seeds=(3, 4), **options)


def assert_same(one: Runs, other: Runs) -> None:
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        assert torch.equal(a, b)


# float32 rounding of another order of operations, over 40 steps; sign amplifies it where a momentum crosses 0
@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"dropout": 0.2}], ids=["dense", "norm", "dropout"])
@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-4), ("lion", 2e-3)])
def test_runs_are_those_of_the_unroll_with_the_registered_rule(
    name: str, tolerance: float, options: dict[str, Any]
) -> None:
    problem = digits(**options)
    rule = registry.create("optimizer", name, lr=3e-3)
    horizon = 40
    with torch.no_grad():
        carry, losses = start(problem, rule, [3, 4]), []
        for rate in schedule(horizon).tolist():
            loss, carry = unroll(problem, rule, carry, 1, hp={"lr": 0.5 * rate * 3e-3})
            losses.append(loss)
    expected = problem.normalize(split_losses(problem, carry.params, problem.valid))
    found = runs_of(problem, from_rule(rule).program(), horizon=horizon, multipliers=(0.5,))
    torch.testing.assert_close(found.losses[0, 0, :, -1], expected, rtol=tolerance, atol=0)
    curve = problem.normalize(torch.cat(losses, 1)).double().mean(1)
    torch.testing.assert_close(found.train[0, 0], curve, rtol=tolerance, atol=0)
    assert found.diverged.eq(-1).all()


def test_the_schedule_warms_up_and_falls_to_nothing_at_every_length() -> None:
    for horizon in (1, 2, 20, 100):
        rates = schedule(horizon)
        assert len(rates) == horizon and float(rates.max()) == 1 and bool((rates > 0).all())
    rates = schedule(100)
    assert rates[:5].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert float(rates[-1]) < 1e-3 and bool((rates[5:].diff() < 0).all())


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler: stacked products round as their number wants")
def test_a_run_does_not_depend_on_the_runs_beside_it_nor_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # but Muon: torch's products of stacked matrices may round as their number wants
    task, others = digits(), [program(text) for name, text in SEEDS.items() if name != "muon"]
    mine = program(NORMED)
    alone = runs_of(task, mine, checkpoints=2)
    among = runs_of(task, *others, mine, *others, checkpoints=2)
    assert_same(alone, Runs(*(part[len(others)][None] for part in vars(among).values())))
    monkeypatch.setattr(evaluate, "IN_CACHE", 1)  # one run after the other
    assert_same(runs_of(task, *others, mine, *others, checkpoints=2), among)


def test_stacked_torch_gradients_depend_on_neighbours_by_rounding_only() -> None:
    task, others = digits(norm="layer"), [program(text) for text in SEEDS.values()]
    alone, among = runs_of(task, program(NORMED)), runs_of(task, program(NORMED), *others)
    torch.testing.assert_close(alone.losses, among.losses[:1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("task", [{}, {"norm": "layer"}])
def test_runs_that_diverge_are_the_worst_and_change_no_bit_of_others(task: dict[str, Any]) -> None:
    problem = digits(**task)
    good, fine = program(SEEDS["momentum"]), program(SEEDS["lion"])
    # as many runs in both, so that stacked products round alike
    clean = runs_of(problem, good, fine, good, fine, checkpoints=2)
    mixed = runs_of(problem, good, program(EXPLODES), program(LATE_NAN), fine, checkpoints=2)
    same = (0, 3)
    for a, b in zip(vars(clean).values(), vars(mixed).values(), strict=True):
        if problem.dense is not None:
            assert all(torch.equal(a[k], b[k]) for k in same)
        else:  # after the others are gone there are fewer
            assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=0) for k in same)
    worst = float(problem.normalize(torch.tensor(math.nan)))
    assert mixed.losses[1].eq(worst).all() and mixed.losses[2, ..., -1].eq(worst).all()
    assert mixed.losses[2, ..., 0].lt(worst).all(), "the first look, after 20 steps, came before the trouble"
    assert mixed.diverged[2].eq(31).all(), "30 good updates, and the one that made it NaN"
    assert mixed.diverged[1].ge(1).all() and mixed.diverged[1].le(3).all()
    assert mixed.train[2].gt(clean.train[0]).all()


def test_training_again_gives_the_same_bits() -> None:
    programs = [program(text) for text in (*SEEDS.values(), NORMED, LATE_NAN)]
    assert_same(runs_of(digits(), *programs), runs_of(digits(), *programs))


def test_programs_with_other_slots_and_the_same_mathematics_agree() -> None:
    renamed = SEEDS["lion"].replace("m", "z").replace("zixed", "mixed").replace("zul", "mul")
    with_idle_slot = renamed.replace("(w, g, z, lr)", "(w, g, z, idle, lr)").replace("update, z\n", "update, z, idle\n")
    one, two = (runs_of(digits(), program(text), program(SEEDS["adamw"])) for text in (SEEDS["lion"], with_idle_slot))
    assert_same(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "needs a seed and a multiplier"),
        ({"multipliers": ()}, "needs a seed and a multiplier"),
        ({"horizon": 0}, r"checkpoints must be in \[1, horizon = 0\]"),
        ({"checkpoints": 11}, r"checkpoints must be in \[1, horizon = 10\], got 11"),
    ],
)
def test_what_cannot_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(digits(), encode([program(NORMED)]), **{"horizon": 10, "seeds": (0,), **options})
