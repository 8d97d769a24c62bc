"""The outer loop: known optima, what is kept, warm and cold starts, tolerances, and resuming."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.resolve import resolve_rule
from metaopt.rule import Params
from metaopt.tune import Hypers, Inner
from metaopt.tune.combined import search
from metaopt.tune.outer import HYPERS_FILE, RESULT_FILE, Diverged, Line, OuterConfig, solve
from metaopt.tune.problem import BilevelProblem

A = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.8, 0.1], [0.0, 0.1, 1.2]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 0.7]], dtype=torch.float64)
C = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
PENALTY = 0.3
BEST = torch.linalg.solve(
    B.T @ torch.linalg.solve(A, torch.linalg.solve(A, B)) + PENALTY * torch.eye(2, dtype=torch.float64),
    B.T @ torch.linalg.solve(A, C),
)
"""Of outer |w - C|^2 / 2 + PENALTY |l|^2 / 2, where w = A^-1 B l."""


@dataclass(frozen=True)
class Quadratic(BilevelProblem):
    steps: int = 25
    lr: float = 0.9
    shift: float = 0.0

    def hypers(self, generator: Generator) -> Hypers:
        return {"l": torch.randn(2, generator=generator, dtype=torch.float64)}

    def inner(self, step: int) -> Inner:
        def loss(params: Params, hypers: Hypers, batch: None) -> Tensor:
            return params["w"] @ A @ params["w"] / 2 - params["w"] @ B @ hypers["l"]

        start = {"w": torch.zeros(3, dtype=torch.float64)}
        return Inner.of_rule(loss, resolve_rule("sgd", lr=self.lr), start, self.steps)

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        return ((params["w"] - C) ** 2).sum() / 2 + PENALTY * (hypers["l"] ** 2).sum() / 2

    def holdout(self, params: Params, hypers: Hypers) -> Tensor | None:
        return ((params["w"] - self.shift * C) ** 2).sum() / 2 if self.shift else None


CONFIG = OuterConfig(method="unroll", steps=120, rule="momentum", lr=0.05, checkpoint_every=7)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, rule="nesterov", method="replay"),
        dataclasses.replace(CONFIG, method="cg", method_options={"iterations": 3}, start="warm"),
        dataclasses.replace(CONFIG, method="cg", method_options={"iterations": 3}, tolerance=0.5, tolerance_decay=0.85),
        dataclasses.replace(
            CONFIG, rule="sgd", lr=0.2, method="es", method_options={"pairs": 1}
        ),  # another direction each time
    ],
    ids=["unroll", "replay", "warm", "tolerance", "es"],
)
def test_reaches_the_optimum_in_closed_form(config: OuterConfig) -> None:
    result = solve(Quadratic(steps=25 if config.start == "cold" and config.tolerance is None else 5), config)
    # momentum 0.9 contracts by about sqrt(0.9) a step: 120 steps leave 2e-3
    torch.testing.assert_close(result.last["l"], BEST, rtol=0, atol=5e-3)


def test_inner_runs_are_as_exact_as_the_tolerance_asks() -> None:
    config = dataclasses.replace(CONFIG, method="cg", steps=30, tolerance=0.5, tolerance_decay=0.7)
    lines = solve(Quadratic(steps=3), config).history[:-1]
    found = [line["diagnostics"]["stationarity"] for line in lines]
    assert all(value <= 0.5 * 0.7**k for k, value in enumerate(found))
    assert found[0] > 1e-3  # and early ones no more exact than that


def test_a_tolerance_needs_an_inner_loss() -> None:
    @dataclass(frozen=True)
    class Lossless(Quadratic):
        def inner(self, step: int) -> Inner:
            return dataclasses.replace(super().inner(step), loss=None)

    with pytest.raises(ValueError, match="a tolerance needs an inner problem with a loss"):
        solve(Lossless(), dataclasses.replace(CONFIG, method="auto", tolerance=0.1))


def test_keeps_what_is_best_on_the_third_split_and_tells_the_gap() -> None:
    # the holdout wants half of what the outer objective wants, so it is passed on the way there
    result = solve(Quadratic(shift=0.3), dataclasses.replace(CONFIG, lr=0.01, rule="sgd"))
    holdouts = [line["holdout"] for line in result.history]
    best = min(range(len(holdouts)), key=holdouts.__getitem__)
    assert 0 < best < len(holdouts) - 1
    assert (result.step, result.holdout) == (best, holdouts[best])
    assert result.gap == holdouts[best] - result.outer
    assert result.last_gap == holdouts[-1] - result.history[-1]["outer"]
    optimal = torch.linalg.solve(A, B @ result.hypers["l"])
    torch.testing.assert_close(result.params["w"], optimal, rtol=0, atol=1e-6)  # of the same step


def test_without_a_third_split_the_last_is_kept() -> None:
    result = solve(Quadratic(), CONFIG)
    assert (result.step, result.gap) == (CONFIG.steps, None)
    assert torch.equal(result.hypers["l"], result.last["l"])


class Stop(Exception):
    pass


def stop_at(step: int, line: Line) -> None:
    if line["step"] == step:
        raise Stop


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_a_loop_that_was_killed_ends_with_the_same_bits(tmp_path: Path, start: str) -> None:
    problem, config = Quadratic(shift=0.5), dataclasses.replace(CONFIG, steps=25, rule="adam", start=start)
    solve(problem, config, tmp_path / "unbroken")
    for step in (4, 11, 18):  # between checkpoints, once before the first
        with pytest.raises(Stop):
            solve(problem, config, tmp_path / "killed", on_step=functools.partial(stop_at, step))
    solve(problem, config, tmp_path / "killed")
    for name in (HYPERS_FILE, RESULT_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def interrupt_at(step: int, line: Line) -> None:
    if line["step"] == step:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_a_loop_after_a_step_that_is_saved(tmp_path: Path) -> None:
    problem, config = Quadratic(shift=0.5), dataclasses.replace(CONFIG, steps=12, rule="adam")
    solve(problem, config, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        solve(problem, config, tmp_path / "stopped", on_step=functools.partial(interrupt_at, 3))
    lines: list[Line] = []
    solve(problem, config, tmp_path / "stopped", on_step=lines.append)
    assert lines[0]["step"] == 4
    for name in (HYPERS_FILE, RESULT_FILE):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_loop_that_has_ended_takes_further_steps(tmp_path: Path) -> None:
    problem, config = Quadratic(shift=0.5), dataclasses.replace(CONFIG, steps=25, rule="adam")
    solve(problem, config, tmp_path / "at_once")
    for steps in (10, 24, 25):
        solve(problem, dataclasses.replace(config, steps=steps), tmp_path / "extended")
    for name in (HYPERS_FILE, RESULT_FILE):
        assert (tmp_path / "extended" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    with pytest.raises(ValueError, match="holds a run with steps=25, not 20"):
        solve(problem, dataclasses.replace(config, steps=20), tmp_path / "extended")


def test_the_kind_of_start_is_recorded_and_matters(tmp_path: Path) -> None:
    found = {}
    for start in ("cold", "warm"):
        # two steps from zero leave an error of the inner problem, which a warm start does away with
        solve(Quadratic(steps=2), dataclasses.replace(CONFIG, start=start), tmp_path / start)
        found[start] = json.loads((tmp_path / start / RESULT_FILE).read_text())
        assert found[start]["start"] == start
        assert json.loads((tmp_path / start / "config.json").read_text())["start"] == start
    assert found["warm"]["outer"] < found["cold"]["outer"] - 0.01


@pytest.mark.parametrize(
    ("problem", "config", "difference"),
    [
        (Quadratic(), dataclasses.replace(CONFIG, start="warm"), "start='cold', not 'warm'"),
        (Quadratic(lr=0.5), CONFIG, "problem='Quadratic"),
    ],
)
def test_another_run_in_the_directory_is_refused(
    tmp_path: Path, problem: BilevelProblem, config: OuterConfig, difference: str
) -> None:
    solve(Quadratic(), dataclasses.replace(CONFIG, steps=3), tmp_path)
    with pytest.raises(ValueError, match="holds a run with") as error:
        solve(problem, dataclasses.replace(config, steps=3), tmp_path)
    assert difference in str(error.value)


def test_a_run_that_diverges_says_so() -> None:
    with pytest.raises(Diverged, match="lower the learning rate of the inner run"):
        solve(Quadratic(lr=1e200), CONFIG)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"start": "hot"}, "start must be one of cold, warm, got 'hot'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0, got nan"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        (
            {"tolerance": 0.1, "method": "replay"},
            "a tolerance asks for a solution, and 'replay' differentiates the run",
        ),
        ({"tolerance_decay": 1.0}, r"tolerance_decay must be in \(0, 1\), got 1.0"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OuterConfig(**setting)


def test_a_sampler_chooses_what_is_discrete_and_gradients_the_rest(tmp_path: Path) -> None:
    def make(trial: optuna.Trial) -> tuple[BilevelProblem, OuterConfig]:
        noise = trial.suggest_categorical("noise", [0.5, 3.0])  # stands for any discrete choice; less noise is better
        problem = registry.create("problem", "ridge", dimensions=5, noise=noise)
        lr = trial.suggest_float("lr", 0.05, 1.0, log=True)
        return problem, OuterConfig(method="unroll", steps=10, lr=lr)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    best = search(make, study, 8, tmp_path)
    assert study.best_params["noise"] == 0.5
    kept = json.loads((best / RESULT_FILE).read_text())
    assert kept["holdout"] == study.best_value == min(trial.value for trial in study.trials if trial.value is not None)
    assert kept["holdout"] < kept["history"][0]["holdout"]  # the gradient improved on the start
    assert study.best_trial.user_attrs["gap"] == kept["gap"]


def test_a_search_prunes_what_diverges_and_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    with pytest.raises(ValueError, match="no trial was completed"):
        search(lambda trial: (Quadratic(lr=1e200, shift=1.0), CONFIG), study, 2, tmp_path)
    assert all(trial.state is optuna.trial.TrialState.PRUNED for trial in study.trials)
    with pytest.raises(ValueError, match="Quadratic has no holdout"):
        search(lambda trial: (Quadratic(), CONFIG), study, 1, tmp_path)
    with pytest.raises(ValueError, match="must minimise"):
        search(lambda trial: (Quadratic(), CONFIG), optuna.create_study(direction="maximize"), 1, tmp_path)


def test_a_problem_is_asked_for_and_not_its_name() -> None:
    with pytest.raises(TypeError, match=r"problem must be a BilevelProblem, got 'ridge'; a registered one is"):
        solve("ridge", CONFIG)  # type: ignore[arg-type]
