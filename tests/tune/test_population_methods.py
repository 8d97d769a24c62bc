"""Population-based training and cross-entropy find what is known to be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from metaopt.cli import main
from metaopt.resolve import resolve_rule
from metaopt.tune import population
from metaopt.tune.tuning import Problem, TuneConfig

CONFIG = TuneConfig("sgd", "digits_mlp", trials=32, steps=40, units=4, seeds=1, search=("lr=1e-3:1",))


def test_population_based_training_beats_the_defaults_and_stays_inside_the_space() -> None:
    found = population.population_based_training(Problem(CONFIG), 8)
    assert len(found.values) == 4 and all(1e-3 <= values["lr"] <= 1 for values in found.values)
    assert found.runs == 8
    # SGD's default of 1e-3 barely moves in 40 steps: any working search is far ahead of it
    assert found.valid.high < found.constant.low


def test_a_member_that_copies_another_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing explored, a line is one member's values throughout: those of the one that was copied."""
    monkeypatch.setattr(population, "FACTORS", (1.0,))
    found = population.population_based_training(Problem(CONFIG), 8)
    assert len({values["lr"] for values in found.values}) == 1


def test_cross_entropy_raises_a_learning_rate_that_is_too_low(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, search=("lr",), trials=48)
    found, _, theta = population.cross_entropy(config, population=16, knots=3, spread=1.5)
    assert found.valid.high < found.constant.low
    assert found.runs == 48 and theta["lr"].shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "hyperband"], "method must be optuna, pbt or cross-entropy, got 'hyperband'"),
        (["--method", "pbt", "--trials", "2"], "a population needs at least 4 members, got 2"),
        (["--method", "pbt", "--search", "nesterov"], "pbt moves numbers during training, which nesterov is not"),
        (
            ["--method", "pbt", "--sampler", "gp", "--limit", "memory=1"],
            "pbt does not read --sampler, --limit; leave it",
        ),
        (["--method", "cross-entropy", "--trials", "3"], "cross-entropy trains 32 schedules at a time, got 3 trials"),
        (["--method", "cross-entropy", "--schedule", "cosine"], "leave --schedule and --set out"),
    ],
)
def test_what_a_method_cannot_do_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "sgd", "--steps", "20", "--task", "booth", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_schedule_that_was_found_can_be_raced(tmp_path: Path) -> None:
    arguments = ["tune", "sgd", "--task", "booth", "--steps", "20", "--trials", "32", "--out", str(tmp_path)]
    assert main([*arguments, "--method", "cross-entropy"]) == 0
    assert "horizon" in resolve_rule(str(tmp_path)).requirements()


def test_a_directory_keeps_the_result_of_its_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "booth", "--steps", "20", "--trials", "4", "--method", "pbt", "--out", str(tmp_path)]
    assert main(["tune", "sgd", "--search", "lr", *arguments]) == 0
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    assert main(["tune", "adamw", "--search", "lr", *arguments]) == 2
    assert "holds the result of sgd on booth, not of adamw on booth; choose another" in capsys.readouterr().err
    assert kept.read_bytes() == before
    assert main(["tune", "sgd", "--search", "lr", *arguments]) == 0
    assert kept.read_bytes() == before
