"""Stages of rising cost: who goes on, and that fitness ranks by how far."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from metaopt import registry
from metaopt.program.build import compiler
from metaopt.program.program import Program
from metaopt.suite import HELD_OUT, refuse_held_out_data
from metaopt.task import Task
from metaopt_symbolic import cascade as module
from metaopt_symbolic.cascade import JUDGES, Cascade, Stage
from metaopt_symbolic.genome import SEEDS, from_rule, parse
from metaopt_symbolic.suites import SUITES, tasks_of

NOTHING = "def train(w, g, m, lr):\n    update = mul(g, 0.0)\n    return update, m\n"
ASCENDS = "def train(w, g, m, lr):\n    update = mul(g, -0.1)\n    return update, m\n"


def tasks() -> dict[str, Task]:
    small = {"hidden": (8,), "batch_size": 16}
    return {
        "digits": registry.create("task", "digits_mlp", **small),
        "mixtures": registry.create("task", "mixtures_mlp", **small),
    }


def stages() -> tuple[Stage, ...]:
    return (
        Stage(("digits",), (5, 10, 15), keep=0.5),
        Stage(("digits", "mixtures"), (10, 15, 20), multipliers=(0.3, 1.0)),
    )


def candidates() -> list[Program]:
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    return [
        *(parse(text).program() for text in (*SEEDS.values(), NOTHING, ASCENDS)),
        *(from_rule(registry.create("optimizer", name, lr=lr)).program() for name in ("adamw", "lion") for lr in rates),
    ]


def test_survivors_of_a_stage_rank_above_those_that_it_dropped_and_these_by_their_loss() -> None:
    found = Cascade(tasks(), stages()).scores(candidates())
    dropped, kept = ([s for s in found if s.stage == k] for k in range(2))
    assert dropped and kept
    assert max(s.fitness for s in dropped) < min(s.fitness for s in kept)
    assert all(s.fitness == pytest.approx(-sum(s.losses.values()) / 2) for s in kept)
    by_loss = sorted(dropped, key=lambda s: s.losses["digits"])
    assert by_loss == sorted(dropped, key=lambda s: -s.fitness)
    assert all(s.updates == 30 for s in dropped) and all(s.updates == 30 + 2 * 2 * 45 for s in kept)
    best_dropped = min(s.losses["digits"] for s in dropped)
    again = Cascade(tasks(), stages()[:1]).scores(candidates())
    first = [s.losses["digits"] for s in again]
    assert all(loss <= best_dropped for loss, s in zip(first, found, strict=True) if s.stage == 1)


def test_who_learns_nothing_is_dropped_even_where_all_may_pass() -> None:
    first, second = stages()
    generous = Cascade(tasks(), (Stage(first.tasks, first.horizons, keep=1.0), second))
    nothing, ascends, lion = generous.scores([parse(t).program() for t in (NOTHING, ASCENDS, SEEDS["lion"])])
    assert nothing.stage == ascends.stage == 0 and lion.stage == 1
    assert nothing.fitness > ascends.fitness


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler: stacked products round as their number wants")
def test_scores_do_not_depend_on_the_order_nor_losses_on_company() -> None:
    programs = candidates()
    found = Cascade(tasks(), stages()).scores(programs)
    backwards = Cascade(tasks(), stages()).scores(programs[::-1])[::-1]
    assert found == backwards
    alone = Cascade(tasks(), stages()).scores(programs[:1])[0]  # nobody is judged yet, so that it comes to the end
    (final,) = Cascade(tasks(), stages()[1:]).scores(programs[:1])
    assert alone.losses == final.losses and alone.fitness == final.fitness


def test_a_restored_cascade_goes_on_as_the_one_it_was() -> None:
    programs = candidates()
    whole = Cascade(tasks(), stages())
    first = whole.scores(programs[:12])
    saved = json.loads(json.dumps(whole.state()))
    rest = whole.scores(programs[12:])
    resumed = Cascade(tasks(), stages())
    resumed.restore(saved)
    assert resumed.scores(programs[12:]) == rest
    assert Cascade(tasks(), stages()).scores(programs[12:]) != rest, "what was seen decides who goes on"
    assert len(first) == 12
    with pytest.raises(ValueError, match="the state is of 2 stages, this cascade has 1"):
        Cascade(tasks(), stages()[:1]).restore(saved)


def test_a_stage_judges_by_its_latest_scores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 5)
    judge = Cascade(tasks(), stages())
    judge.scores(candidates()[:8])
    assert len(judge.state()["seen"][0]) == 5


def test_a_program_that_always_takes_the_full_rate_is_scored_at_more_than_two_lengths() -> None:
    with pytest.raises(ValueError, match="horizons must be at least 3 different ones"):
        Stage(("digits",), (10, 10, 20))
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        Stage(("digits",), (10, 15, 20), keep=0.0)


def test_each_task_may_have_its_own_best_rate() -> None:
    alike = Stage(("digits", "mixtures"), (10, 15, 20), multipliers=(0.1, 1.0, 10.0))
    lion = [parse(SEEDS["lion"]).program()]
    (own,) = Cascade(tasks(), (dataclasses.replace(alike, own_rates=True),)).scores(lion)
    (one,) = Cascade(tasks(), (alike,)).scores(lion)
    each = [
        Cascade(tasks(), (dataclasses.replace(alike, multipliers=(rate,)),)).scores(lion)[0].losses
        for rate in alike.multipliers
    ]
    assert own.losses == {name: min(losses[name] for losses in each) for name in alike.tasks}
    assert one.losses in each and own.fitness >= one.fitness
    three = Cascade(tasks(), (dataclasses.replace(alike, own_rates=True),)).scores(lion * 3)
    assert {score.multiplier for score in three} <= {*alike.multipliers}


@pytest.mark.parametrize("judge", ["usual", "thorough"])
def test_the_usual_stages_cost_ever_more_and_end_on_all_tasks(judge: str) -> None:
    names = [*"abcdefghij"]
    found = JUDGES[judge](names)
    assert [len(stage.tasks) for stage in found] == {"usual": [2, 4, 10], "thorough": [3, 6, 10]}[judge]
    assert found[-1].tasks == tuple(names)
    assert all(after.cost >= 4 * before.cost for before, after in itertools.pairwise(found))


def test_stages_and_tasks_must_fit() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        Cascade(tasks(), ())
    with pytest.raises(ValueError, match="a stage names the task 'cifar'; there are digits, mixtures"):
        Cascade(tasks(), (Stage(("cifar",), (1, 2, 3)),))
    unbounded = tasks()
    unbounded["digits"].normalize = lambda loss: Task.normalize(unbounded["digits"], loss)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="normalised losses of digits must be in"):
        Cascade(unbounded, stages()[:1])


@pytest.mark.parametrize("suite", SUITES)
def test_suites_of_a_search_are_small_dense_networks_and_none_on_which_results_are_judged(suite: str) -> None:
    judging = [spec for spec in registry.specs("task").values() if spec.facts.get("suite") in ("valid", HELD_OUT)]
    refuse_held_out_data((registry.get("task", d["task"]).facts["data"] for d in SUITES[suite].values()), "a search")
    refuse_held_out_data((d.get("data") for d in SUITES[suite].values()), "a search")

    def definition(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in arguments.items() if key not in ("name", "task", "horizon")}

    for name, task in tasks_of(suite).items():
        declared = SUITES[suite][name]
        registered = registry.get("task", declared["task"])
        assert registered.facts["suite"] in ("fast", "train")
        assert definition({**registered.defaults, **declared}) not in [definition(spec.defaults) for spec in judging]
        assert task.dense is not None and task.name == name
        assert 100 <= sum(math.prod(info.shape) for info in task.info().values()) <= 5200


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(ValueError, match="no suite of a search is called 'fast'; there are search, broad, sign"):
        tasks_of("fast")
