"""Baselines are tuned as candidates are, the funnel cuts who is not better, and scaled programs take scaled steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metaopt import registry
from metaopt.cli import main
from metaopt.program.population import encode
from metaopt.search import Elite
from metaopt.task import Task
from metaopt_symbolic import funnel as module
from metaopt_symbolic.baselines import baselines, family, tuned_start
from metaopt_symbolic.cascade import Cascade, Stage
from metaopt_symbolic.champion import write_champion
from metaopt_symbolic.evaluate import train
from metaopt_symbolic.funnel import Gate, distinct, funnel, usual_gates
from metaopt_symbolic.genome import SEEDS, parse
from metaopt_symbolic.suites import tasks_of


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARNING_RATES", (0.1, 0.03, 0.01))
    monkeypatch.setattr(module, "FACTORS", (0.3, 1.0, 3.0))


def small() -> dict[str, Task]:
    options = {"hidden": (8,), "batch_size": 16}
    return {name: registry.create("task", name, **options) for name in ("digits_mlp", "mixtures_mlp")}


NOTHING = parse("def train(w, g, m, lr):\n    update = mul(g, 0.0)\n    return update, m\n")
SPLIT = """\
def train(w, g, m, lr):
    a = mul(lr, 0.5)
    lr = mul(lr, 0.2)
    a = add(a, lr)
    update = mul(g, a)
    return update, m
"""
RAW = "def train(w, g, m, lr):\n    update = mul(g, lr)\n    return update, m\n"


@pytest.mark.parametrize("text", [*SEEDS.values(), SPLIT, RAW])
def test_a_scaled_program_trains_as_the_program_does_at_the_scaled_rate(text: str) -> None:
    genome, task = parse(text), small()["digits_mlp"]
    plain = train(task, encode([genome.program()]), horizon=10, seeds=(0,), multipliers=(3.0,)).losses
    scaled = train(task, encode([genome.scaled(3.0).program()]), horizon=10, seeds=(0,)).losses
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)  # 3 (0.2 lr) rounds otherwise than (0.6) lr


def test_a_factor_goes_into_the_number_that_the_rate_is_multiplied_by_where_nothing_else_reads_it() -> None:
    assert parse(SEEDS["adamw"]).scaled(2.0).text() == SEEDS["adamw"].replace("mul(lr, 0.001)", "mul(lr, 0.002)")
    assert len(parse(SPLIT).scaled(2.0).body) == len(parse(SPLIT).body) + 1


def test_a_start_and_baselines_are_the_best_of_what_was_tried() -> None:
    tasks, stage = small(), Stage(("digits_mlp", "mixtures_mlp"), (10, 15, 20))
    judge = Cascade(tasks, [stage])

    def fitness(text: str) -> float:
        return judge.scores([parse(text).program()])[0].fitness

    start = tuned_start(SEEDS["lion"], tasks, [stage])
    others = [parse(SEEDS["lion"]).scaled(f).text() for f in (0.1, 1.0, 10.0, 100.0)]
    assert fitness(start) >= max(map(fitness, others)) > fitness(SEEDS["lion"]) - 1e-6
    found = baselines(tasks, stage)
    for name in ("adamw", "lion"):
        untuned = [genome.scaled(0.01).text() for genome in family(name)]
        # the factor written into the program rounds the learning rate anew
        assert found[name].score.fitness == pytest.approx(fitness(found[name].genome.text()), abs=1e-4)
        assert found[name].score.fitness >= max(map(fitness, untuned)) - 1e-4


def test_who_is_not_better_than_adamw_is_cut_and_the_best_is_named_all_the_same() -> None:
    gate = Gate("small", small(), 20)
    found = funnel([NOTHING], [gate, gate])
    assert not found.passed and found.champion == NOTHING
    assert list(found.gates) == ["small"]
    by_name = {r.contender: r for r in found.gates["small"]}
    assert by_name["adamw"].ahead.iqm == 0 and not by_name[NOTHING.digest].passes
    assert all(len(seeds) == len(module.SCORE_SEEDS) for r in by_name.values() for seeds in r.losses.values())


def test_adamw_with_a_head_start_passes() -> None:
    """Who has the learning rate that the baselines are not allowed wins."""
    gates = [Gate(name, small(), 20) for name in ("first", "second")]
    better = family("adamw")[0].scaled(0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEARNING_RATES", (1e-4, 1e-3))
        found = funnel([NOTHING, better], gates)
    assert found.passed and found.champion == better
    assert [{r.contender for r in rows} for rows in found.gates.values()] == [
        {"adamw", "lion", NOTHING.digest, better.digest}, {"adamw", "lion", better.digest},
    ]  # fmt: skip
    assert found.gates["second"][0].ahead.low > 0


def test_of_elites_that_differ_in_numbers_the_best_takes_part() -> None:
    def elite(text: str, score: float) -> Elite:
        return Elite(parse(text).digest, text, score, {}, 0, 0, (), {"multiplier": 3.0})

    lion, other = SEEDS["lion"], SEEDS["lion"].replace("0.99", "0.98")
    elites = [elite(lion, 0.4), elite(other, 0.3), elite(SEEDS["momentum"], 0.5)]
    assert distinct(elites, 5) == [parse(other).scaled(3.0), parse(SEEDS["momentum"]).scaled(3.0)]
    assert distinct(elites, 1) == [parse(other).scaled(3.0)]


def test_candidates_choose_among_as_many_settings_as_baselines() -> None:
    found = module.settings(parse(SEEDS["adamw"]))
    assert len(found) == len(family("adamw")) == len(set(found)) and found[0] == parse(SEEDS["adamw"])
    texts = [genome.text() for genome in found]
    assert all("interpolate(g, m, 0.99)" in text and "interpolate(g2, v, 0.9999)" in text for text in texts[6:])
    assert ["mul(w, 0.0)" in text for text in texts] == [False, False, True] * 3
    assert all("mul(lr, 0.001)" in text for text in texts)
    assert module.settings(NOTHING) == [NOTHING]


def test_candidates_without_weight_decay_get_it_where_their_update_takes_its_size() -> None:
    plain = parse(SEEDS["rmsprop"])
    decayed = module.with_decay(plain).text()
    line = "    update = mul(update, lr)\n"
    assert decayed == SEEDS["rmsprop"].replace(
        line, f"    shrink = mul(w, 0.3)\n    update = add(update, shrink)\n{line}"
    )
    assert len(module.settings(module.with_decay(plain))) == 9
    for text in (SEEDS["adamw"], RAW.replace("mul(g, lr)", "div(g, lr)")):
        assert module.with_decay(parse(text)) == parse(text)
    other = RAW.replace("update = mul(g, lr)", "x = sign(g)\n    update = mul(x, lr)")
    assert "x = add(x, shrink)\n    update = mul(x, lr)" in module.with_decay(parse(other)).text()
    taken = SEEDS["rmsprop"].replace("root", "shrink")
    assert "shrink0 = mul(w, 0.3)" in module.with_decay(parse(taken)).text()


def test_gates_are_wider_than_the_search_and_of_valid_only() -> None:
    first, second = usual_gates("search")
    searched = tasks_of("search")
    assert all(sum(task.hidden) == 3 * sum(searched[name].hidden) for name, task in first.tasks.items())
    specs = registry.specs("task")
    assert len(second.tasks) >= 8 and {specs[name].facts["suite"] for name in second.tasks} == {"valid"}
    with pytest.raises(
        ValueError, match=r"a search on one suite \(search, broad, sign\), this one was on 'search,digits_mlp'"
    ):
        usual_gates("search,digits_mlp")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path)
    assert main(["discover", "funnel", out]) == 2
    assert "holds no search" in capsys.readouterr().err
    monkeypatch.setattr(module, "usual_gates", lambda suite, device: (Gate("small", small(), 20),))
    assert (
        main(
            ["discover", "rule", "--budget", "200", "--out", out, "--set", "population=200", "--tasks", "mixtures_mlp"]
        )
        == 0
    )
    assert main(["discover", "funnel", out, "--most", "2"]) == 0
    facts = json.loads((tmp_path / "funnel.json").read_text())
    assert parse(facts["champion"]) == parse((tmp_path / "champion.txt").read_text())
    assert {r["contender"] for r in facts["gates"]["small"]} > {"adamw", "lion"}
    (tmp_path / "funnel.json").write_text(json.dumps({**facts, "found": SEEDS["rmsprop"]}))
    simplified, _ = write_champion(tmp_path, tolerance=0.0, evolution=0)
    assert "shrink = mul(w, 0.3)" in simplified.genome.text()  # which no short run misses
