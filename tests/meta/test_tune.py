"""Searching the hyperparameters of meta-training: trials are runs, killed searches go on, populations descend."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from metaopt.cli import main
from metaopt.meta import trainer, tune
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.evaluation import Evaluation
from metaopt.meta.tune import meta_tune, with_settings
from metaopt.resolve import load_theta

CONFIG = MetaTrainConfig(
    tasks=[{"name": "quadratic", "options": {"dim": 4}}], learned_options={"hidden": 4}, horizon=5,
    estimator_options={"pairs": 2, "window": 5}, outer_steps=3, evaluate_every=1, evaluate_on=["quadratic"],
    checkpoint_every=1,
)  # fmt: skip
SPACE = {"outer_lr": (1e-3, 1e-1)}


@pytest.fixture
def score_by_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations say -|log10(lr / 0.01)|, which is greatest at 0.01, whatever was trained."""
    runs: list[trainer._Run] = []
    make = trainer._Run.__init__

    def remember(run: trainer._Run, *arguments: Any) -> None:
        make(run, *arguments)
        runs.append(run)

    def score(evaluation: Evaluation, *_: object) -> dict[str, float]:
        return {"quadratic": -abs(float(torch.tensor(runs[-1].config.outer_lr / 0.01).log10()))}

    monkeypatch.setattr(trainer._Run, "__init__", remember)
    monkeypatch.setattr(Evaluation, "scores", score)


def trials_in(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(directory / tune.STUDY_FILE)))
    return optuna.load_study(study_name="meta-tune", storage=storage).get_trials()


def test_a_study_finds_the_better_settings_prunes_the_worse_and_names_the_run(
    score_by_learning_rate: None, tmp_path: Path
) -> None:
    result = meta_tune(CONFIG, tmp_path, trials=12, space=SPACE, progress=False)
    trials = trials_in(tmp_path)
    assert len(trials) == 12
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    lengths = [len(trial.intermediate_values) for trial in trials if trial.state == TrialState.PRUNED]
    assert lengths and max(lengths) < 3, "what falls behind the median does not go on to the end"
    assert abs(result.score) < 0.3, "within a factor of two of the best learning rate"
    assert result.score == max(trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE)
    there = json.loads((result.directory / trainer.CONFIG_FILE).read_text())
    assert there["outer_lr"] == result.settings["outer_lr"]
    again = meta_tune(CONFIG, tmp_path, trials=12, space=SPACE, progress=False)
    assert again == result
    assert len(trials_in(tmp_path)) == 12


def interrupted_at(step: int, run: int) -> Callable[[trainer._Run], Any]:
    """Ctrl-C in the given step of the given run (both counted from 1)."""
    advance, seen = trainer._Run.advance, [0]

    def stop(self: trainer._Run) -> Any:
        seen[0] += self.step == 0
        if (seen[0], self.step + 1) == (run, step):
            raise KeyboardInterrupt
        return advance(self)

    return stop


def test_a_search_that_was_stopped_goes_on_with_the_trial_in_its_own_directory(
    score_by_learning_rate: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "advance", interrupted_at(step=3, run=2))
        with pytest.raises(KeyboardInterrupt):
            meta_tune(CONFIG, tmp_path, trials=3, space=SPACE, progress=False)
    stopped = trials_in(tmp_path)[1]
    assert stopped.state == TrialState.RUNNING
    meta_tune(CONFIG, tmp_path, trials=3, space=SPACE, progress=False)
    first, failed, retried, last = trials_in(tmp_path)
    assert failed.state == TrialState.FAIL
    assert retried.params == stopped.params
    assert retried.user_attrs["run"] == stopped.user_attrs["run"]
    assert retried.intermediate_values.keys() == {3}, "the two steps before were not made again"
    assert len({trial.params["outer_lr"] for trial in (first, retried, last)}) == 3, (
        "the sampler does not repeat itself"
    )


def test_a_population_goes_on_from_its_better_members(score_by_learning_rate: None, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, outer_steps=1)
    meta_tune(config, tmp_path, trials=4, generations=3, space=SPACE, progress=False)
    trials = trials_in(tmp_path)
    assert len(trials) == 12
    for generation in (4, 8):
        parents, children = trials[generation - 4 : generation], trials[generation : generation + 4]
        ranked = sorted(parents, key=lambda trial: -trial.values[0])
        best, worst = ranked[0], ranked[-1]
        for parent, child in zip(parents, children, strict=True):
            begun = best if parent is worst else parent
            assert child.user_attrs["parent"] == begun.user_attrs["run"]
            ratio = child.params["outer_lr"] / begun.params["outer_lr"]
            assert ratio == pytest.approx(1) if parent is not worst else min(abs(ratio - 0.8), abs(ratio - 1.25)) < 1e-9
            there = json.loads((tmp_path / child.user_attrs["run"] / trainer.CONFIG_FILE).read_text())
            assert there["init_theta"] == str(tmp_path / begun.user_attrs["run"])
    moved, start = (load_theta(tmp_path / trials[i].user_attrs["run"]).theta["w0"] for i in (4, 0))
    # one step of Adam moves each number by at most about its learning rate, here warm-up's first
    assert 0 < (moved - start).abs().max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": dataclasses.replace(CONFIG, evaluate_every=0, evaluate_on=[])}, "a search compares scores"),
        ({"space": {"outer_lr": (0.0, 1.0)}}, r"the range of outer_lr must be 0 < low < high, got 0.0 and 1.0"),
        ({"space": {"sigma": (0.1, 1.0)}}, "no setting 'sigma'; write outer_lr, or estimator_options.sigma"),
        ({"generations": 2, "trials": 3}, "trials must be at least 4, got 3"),
        ({"space": {"estimator_options.pairs": (2.5, 8.0)}}, "pairs must be an integer of at least 1, got 2.5"),
        ({"space": {"ema_decay": (0.5, 2.0)}}, r"ema_decay must be in \[0, 1\), got 2.0"),
    ],
)
def test_impossible_searches_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        meta_tune(**{"config": CONFIG, "directory": tmp_path / "none", **arguments})
    assert not (tmp_path / "none").exists()


def test_a_search_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a search runs in 1 process, got WORLD_SIZE=2; start it without torchrun"):
        meta_tune(CONFIG, tmp_path / "none", progress=False)


def test_between_integers_only_integers_are_tried_and_a_trial_that_cannot_run_is_no_longer_tried(
    score_by_learning_rate: None, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, outer_steps=1, estimator_options={"window": 5, "pairs_per_task": 2})
    with pytest.raises(ValueError, match=r"trial \d+ with {'estimator_options.pairs': \d+} cannot run: pairs must be"):
        meta_tune(config, tmp_path, trials=20, space={"estimator_options.pairs": (2, 8)}, progress=False)
    assert trials_in(tmp_path)[-1].state == TrialState.FAIL
    config = dataclasses.replace(CONFIG, outer_steps=1)
    meta_tune(
        config, tmp_path / "b", trials=4, generations=2, space={"estimator_options.pairs": (2, 8)}, progress=False
    )
    assert all(isinstance(trial.params["estimator_options.pairs"], int) for trial in trials_in(tmp_path / "b"))


def test_settings_reach_fields_and_options_and_leave_the_rest() -> None:
    changed = with_settings(CONFIG, {"outer_lr": 0.5, "estimator_options.sigma": 0.2})
    assert changed == dataclasses.replace(
        CONFIG, outer_lr=0.5, estimator_options={"pairs": 2, "window": 5, "sigma": 0.2}
    )


def test_the_command_searches_and_another_search_in_its_directory_is_refused(
    score_by_learning_rate: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lopt.toml").write_text(
        'tasks = ["quadratic"]\nhorizon = 5\nouter_steps = 1\nevaluate_every = 1\nevaluate_on = ["quadratic"]\n'
        "estimator_options = { pairs = 2, window = 5 }\nlearned_options = { hidden = 4 }\n"
    )
    command = ["meta-tune", str(tmp_path / "lopt.toml"), "--trials", "2", "--out", str(tmp_path / "search")]
    assert main([*command, "--search", "outer_lr=1e-3:1e-1"]) == 0
    assert "best score" in capsys.readouterr().out
    assert main([*command, "--search", "outer_lr=1e-3:1e-2"]) == 2
    assert "holds a search with space={'outer_lr': [0.001, 0.1]}" in capsys.readouterr().err
    assert main([*command, "--search", "outer_lr=1e-3"]) == 2
    assert "must look like NAME=LOW:HIGH" in capsys.readouterr().err
