"""Search spaces, trials in lock-step, resumption, and what a search leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
import torch
from optuna.trial import FixedTrial, TrialState

from metaopt import registry
from metaopt.cli import main
from metaopt.resolve import resolve_rule
from metaopt.rule import ElementwiseRule
from metaopt.space import hyper
from metaopt.tune import algorithms, pruning_callback, sampler_for, tuning
from metaopt.tune.lockstep import Lockstep, Run
from metaopt.tune.search_space import SearchSpace
from metaopt.tune.studies import open_storage, open_study
from metaopt.tune.tuning import Problem, TuneConfig, select, tune, work

ROOT = Path(__file__).parents[2]
CONFIG = TuneConfig("adamw", "digits_mlp", trials=8, steps=40, units=4, seeds=2, search=("lr",))


def in_memory(problem: Problem) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return open_study(optuna.storages.InMemoryStorage(), "study", problem.settings(), len(problem.config.objectives))


def suggested(space: SearchSpace, params: dict[str, Any]) -> dict[str, Any]:
    return space.suggest(cast(optuna.Trial, FixedTrial(params)))


def test_scales_come_from_the_declaration() -> None:
    space = SearchSpace.of_rule(resolve_rule("adamw"))
    assert [(d.label, d.kind, d.low, d.high) for d in space.dimensions] == [
        ("lr", "log", 1e-4, 1e-1), ("1-beta1", "decay", 0.8, 0.9999), ("1-beta2", "decay", 0.8, 0.9999),
        ("eps", "log", 1e-10, 1e-4), ("weight_decay", "log", 1e-4, 1.0),
    ]  # fmt: skip
    values = suggested(space, {"lr": 0.01, "1-beta1": 0.1, "1-beta2": 0.05, "eps": 1e-8, "weight_decay": 0.1})
    assert values == {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    again = space.values(space.params(values))
    assert again.pop("betas") == pytest.approx(values.pop("betas"))
    assert again == pytest.approx(values)


def test_one_number_of_a_tuple_leaves_the_other_as_it_is() -> None:
    space = SearchSpace.of_rule(resolve_rule("adamw"), ["beta2"])
    assert space.values({"1-beta2": 0.02}) == {"betas": (0.9, 0.98)}


def test_what_a_choice_rules_out_is_not_asked_for() -> None:
    rule = registry.create("optimizer", "scheduled")
    space = SearchSpace.of_rule(rule, ["schedule=constant,cosine", "final_lr"])
    assert suggested(space, {"schedule": "constant"}) == {"schedule": "constant"}
    assert suggested(space, {"schedule": "cosine", "final_lr": 0.1}) == {"schedule": "cosine", "final_lr": 0.1}
    fixed = SearchSpace.of_rule(rule.replaced(schedule="constant"), ["lr", "final_lr"])
    assert [item.label for item in fixed.dimensions] == ["lr"]


def test_integers_and_flags_can_be_searched() -> None:
    space = SearchSpace.of_rule(resolve_rule("muon"), ["ns_steps=1:8", "nesterov"])
    assert suggested(space, {"ns_steps": 3, "nesterov": False}) == {"ns_steps": 3, "nesterov": False}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("momentum", "AdamW has no hyperparameter or option 'momentum' to search; it has lr, betas, eps, weight_decay"),
        ("lr=0:1", "the range of lr must be low < high inside .0, inf. on a log scale, got 0 to 1"),
        ("beta1=0.5:2", "the range of beta1 must be low < high inside .0, 1."),
        ("lr=fast", "must look like lr=1e-4:1e-1, got 'fast'"),
    ],
)  # fmt: skip
def test_impossible_spaces_are_refused(asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace.of_rule(resolve_rule("adamw"), [asked])


def test_a_number_without_a_declared_range_needs_one() -> None:
    class Shrink(ElementwiseRule):
        beta: float = hyper(0.9, 0.0, 1.0, open_high=True)

        def elementwise(self, param: Any, grad: Any, beta: Any) -> Any:  # type: ignore[override]
            return beta * param

    with pytest.raises(ValueError, match=r"beta declares no range to search; write beta=LOW:HIGH, inside \[0, 1\)"):
        SearchSpace.of_rule(Shrink(), ["beta"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"objectives": ("time",)}, "objectives must be different and begin with loss"),
        ({"constraints": {"heat": 1.0}}, "objectives and constraints are of loss, time, memory, got 'heat'"),
        ({"constraints": {"memory": -1.0}}, "the limit of memory must be a number above 0, got -1.0"),
        ({"constraints": {"memory": "1MB"}}, "the limit of memory must be a number above 0, got '1MB'"),
        ({"objectives": ("loss", "time"), "pruner": "median"}, "Optuna prunes by one objective only"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_names_and_urls_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler must be one of tpe, random"):
        algorithms.sampler("grid", 0)
    with pytest.raises(ValueError, match="pruner must be one of lockstep, median"):
        algorithms.pruner("best", 10)
    with pytest.raises(ValueError, match="storage must be journal:PATH"):
        open_storage("study.log")
    with pytest.raises(ValueError, match=r"' cannot be opened: unable to open database file"):
        open_storage(f"sqlite:///{tmp_path}")
    (tmp_path / "file").touch()
    for url in (f"sqlite:///{tmp_path}/file/study.db", f"journal:{tmp_path}/file/study.log"):
        with pytest.raises(ValueError, match=r"/file/study\.\w+' cannot be made: "):
            open_storage(url)
    open_storage(f"sqlite:///{tmp_path}/new/study.db")
    assert (tmp_path / "new" / "study.db").exists()
    with pytest.raises(ValueError, match="units must divide the 40 steps of a run, got 7; try 10"):
        Problem(dataclasses.replace(CONFIG, units=7)).lockstep()
    with pytest.raises(ValueError, match=r"log' is no file; give the one that metaopt tune was given"):
        tuning.join(f"journal:{tmp_path / 'log'}", "mine")
    assert not (tmp_path / "log").exists()
    with pytest.raises(ValueError, match=r"log\.db' is no file"):
        tuning.join(f"sqlite:///{tmp_path / 'log.db'}", "mine")
    open_storage(f"journal:{tmp_path / 'log'}")
    with pytest.raises(ValueError, match="the storage holds no study 'mine'; it holds none"):
        tuning.join(f"journal:{tmp_path / 'log'}", "mine")


def test_a_sampler_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)  # type: ignore[arg-type] # as if it were not installed
    with pytest.raises(ValueError, match="sampler 'cmaes' needs a package that is not installed"):
        algorithms.sampler("cmaes", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "tpee"}, "sampler must be one of"),
        ({"pruner": "mediann"}, "pruner must be one of"),
        ({"units": 7}, "units must divide the 40 steps of a run, got 7"),
    ],
)  # fmt: skip
def test_settings_that_were_refused_leave_no_study_behind(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Such a study would refuse the corrected settings as those of another search."""
    with pytest.raises(ValueError, match=message):
        tune(dataclasses.replace(CONFIG, **change), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="no task is called 'digits_mpl'"):  # before any trial
        tune(CONFIG, tmp_path / "run", select_on="digits_mpl", progress=False)
    assert not (tmp_path / "run").exists()


def test_trials_that_train_together_get_the_values_of_trials_alone() -> None:
    """Also where one enters while others are half done, and where another diverges."""
    problem = Problem(dataclasses.replace(CONFIG, optimizer="sgd"))
    rates = [0.01, 0.1, 1e30, 0.3]

    def alone(lr: float) -> float:
        lockstep = problem.lockstep()
        lockstep.admit([Run("one", {"lr": lr})])
        for _ in range(problem.units):
            runs = lockstep.advance()
        return runs[0].score

    lockstep = problem.lockstep()
    runs = [Run(lr, {"lr": lr}) for lr in rates]
    lockstep.admit(runs[:3])
    lockstep.advance()
    assert [bool(run.diverged) for run in runs[:3]] == [False, False, True]
    lockstep.drop([runs[2]])
    lockstep.admit([runs[3]])
    for _ in range(problem.units - 1):
        lockstep.advance()
    lockstep.drop(runs[:2])
    lockstep.advance()
    for run in (runs[0], runs[1], runs[3]):
        # other sums in float32, over 40 steps
        assert run.score == pytest.approx(alone(run.key), rel=1e-4)
        assert run.units == problem.units


def test_rules_of_other_structure_train_beside_each_other() -> None:
    problem = Problem(dataclasses.replace(CONFIG, optimizer="nesterov", search=("nesterov",)))
    lockstep = problem.lockstep()
    lockstep.admit([Run(flag, {"nesterov": flag}) for flag in (True, False)])
    scores = {run.key: run.score for run in lockstep.advance()}
    for flag in (True, False):
        single = problem.lockstep()
        single.admit([Run(flag, {"nesterov": flag})])
        assert single.advance()[0].score == pytest.approx(scores[flag], rel=1e-5)
    assert scores[True] != scores[False]


def test_pruned_trials_make_room_and_diverged_ones_are_pruned() -> None:
    problem = Problem(
        dataclasses.replace(
            CONFIG, optimizer="sgd", search=("lr=1e-3:1e30",), trials=24, sampler="random", steps=80, units=8
        )
    )
    study, sizes = in_memory(problem), list[int]()
    for i in range(16):
        study.enqueue_trial({"lr": 10 ** (-3 + i / 5)})
    work(problem, study, batch=6, first=True, on_unit=lambda runs: sizes.append(len(runs)))
    trials = study.get_trials()
    assert len(trials) == 24 and {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    diverged = [t for t in trials if "diverged_in_unit" in t.user_attrs]
    assert diverged and all(t.state == TrialState.PRUNED for t in diverged)
    pruned_alive = [t for t in trials if t.state == TrialState.PRUNED and t not in diverged]
    assert pruned_alive and {t.last_step for t in pruned_alive} <= {2, 4}
    numbers = [v for t in trials for v in [*(t.values or []), *t.intermediate_values.values()]]
    assert all(map(math.isfinite, numbers))
    # there were always six under way until the budget was used up
    assert sizes[: sizes.index(min(sizes))].count(6) >= 3 and max(sizes) == 6
    assert len(sizes) < 24 * 8 / 6, "pruning saved nothing"


def test_only_the_better_half_passes_a_rung() -> None:
    study = optuna.create_study(pruner=algorithms.LockstepHalving())
    trials = [study.ask() for _ in range(6)]
    for unit in (1, 2, 3):
        for value, trial in enumerate(trials):
            trial.report(float(value), unit)
        assert [trial.should_prune() for trial in trials] == [unit == 2 and value > 2 for value in range(6)]


def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, trials=4)
    tune(config, tmp_path, batch=4, top=2, confirm_seeds=2, progress=False)
    before = open_study(
        open_storage(f"journal:{tmp_path / 'study.log'}"), "adamw on digits_mlp", Problem(config).settings(), 1
    )
    more = dataclasses.replace(CONFIG, trials=6)
    result = tune(more, tmp_path, batch=4, top=2, confirm_seeds=2, progress=False)
    assert len(result.study.trials) == 6
    for old, new in zip(before.trials[:4], result.study.trials, strict=False):
        assert (old.params, old.values) == (new.params, new.values)
    with pytest.raises(ValueError, match=r"search with search=\['lr'\], not \['beta1'\]; give the same"):
        tune(dataclasses.replace(more, search=("beta1",)), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"holds the result of adamw on digits_mlp, not of lion on digits_mlp; choose"):
        tune(dataclasses.replace(config, optimizer="lion"), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"holds the result of adamw on digits_mlp, not of again; choose another"):
        tune(more, tmp_path, name="again", progress=False)
    # the report, and what race makes of it
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".txt", ".png", ".log"}
    winner = result.selection.winner
    assert resolve_rule(str(tmp_path / "best.json")).hp["lr"] == winner.values["lr"]
    assert json.loads((tmp_path / "tune.json").read_text())["counts"]["complete"] >= 1


def test_the_first_trial_has_the_optimizers_own_values(tmp_path: Path) -> None:
    result = tune(dataclasses.replace(CONFIG, trials=2), tmp_path, batch=2, top=1, confirm_seeds=2, progress=False)
    assert result.study.trials[0].params == {"lr": 1e-3}


def test_the_winner_is_chosen_by_other_seeds_than_its_trials() -> None:
    """Of trials that are all alike but for the luck of their seeds, the study's best value is too good."""
    problem = Problem(dataclasses.replace(CONFIG, seeds=1, search=("lr=0.01:0.0101",), pruner="none"))
    study = in_memory(problem)
    work(problem, study, batch=8, first=True)
    chosen = select(problem, study, top=3, seeds=4)
    assert [c.trial for c in chosen.candidates] != [] and len(chosen.candidates) == 3
    assert [c.valid.iqm for c in chosen.candidates] == sorted(c.valid.iqm for c in chosen.candidates)
    assert chosen.winner.valid.count == 4
    one = Lockstep(problem.course, problem.rule, problem.seeds, 1)
    one.admit([Run(0, chosen.winner.values)])
    assert one.advance()[0].score != pytest.approx(chosen.winner.valid.iqm, rel=1e-6)


def test_a_point_that_was_tried_twice_is_one_candidate() -> None:
    problem = Problem(dataclasses.replace(CONFIG, optimizer="sgd", search=("nesterov",), pruner="none"))
    study = in_memory(problem)
    work(problem, study, batch=8, first=True)  # 8 trials of two choices
    chosen = select(problem, study, top=5, seeds=2)
    assert sorted(candidate.values["nesterov"] for candidate in chosen.candidates) == [False, True]


def test_several_objectives_and_limits() -> None:
    # momentum's state is a copy of the parameters, which plain SGD does without: memory tells them apart exactly
    config = dataclasses.replace(
        CONFIG, objectives=("loss", "time", "memory"), constraints={"memory": 1.0}, trials=3, sampler="random"
    )
    problem = Problem(config)
    study = in_memory(problem)
    work(problem, study, batch=3, first=True)
    parameters = sum(math.prod(info.shape) for info in problem.course.task.info().values())
    for trial in study.get_trials():
        assert trial.state == TrialState.COMPLETE and len(trial.values) == 3
        steps = 8 * len(problem.course.task.info())
        assert trial.values[2] == 3 * 4 * parameters + steps  # parameters and two moments in float32, step counts
        assert trial.constraints == {"memory": trial.values[2] - 1}
    with pytest.raises(ValueError, match=r"no trial of study 'study' has finished and keeps the constraints \(3 are"):
        select(problem, study)


def test_narrow_trials_choose_for_a_wide_model() -> None:
    problem = Problem(
        dataclasses.replace(CONFIG, optimizer="mup_adamw", task="mup_mlp_w32", trials=3, steps=20, units=2)
    )
    study = in_memory(problem)
    work(problem, study, batch=3, first=True)
    assert select(problem, study, top=2, seeds=2, on="mup_mlp_w64").task == "mup_mlp_w64"


def test_a_sampler_begins_with_priors() -> None:
    study = optuna.create_study(sampler=sampler_for("adamw", seed=0))
    asked = []
    for _ in range(12):
        trial = study.ask()
        asked.append((trial.suggest_float("lr", 1e-5, 1.0, log=True), trial.suggest_float("beta2", 0.5, 0.99)))
        study.tell(trial, (math.log(asked[-1][0]) + 4) ** 2)
    assert asked[0][0] == 1e-3  # the default; its beta2, 0.999, is outside the range asked for
    assert 0.5 <= asked[0][1] <= 0.99
    assert 1e-4 < asked[1][0] < 0.1
    assert len({lr for lr, _ in asked}) == 12


def test_a_training_loop_reports_and_is_pruned() -> None:
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    trial = study.ask()
    callback = pruning_callback(trial, every=2, smoothing=0.5)
    callback(0, 0.0)
    callback(1, torch.tensor(0.9, requires_grad=True))
    # bias-corrected mean of 0 and 0.9 with weights 1/4 and 1/2 over 3/4
    assert study.trials[0].intermediate_values == {1: pytest.approx(0.6)}
    callback(2, 2.0)
    with pytest.raises(optuna.TrialPruned):
        callback(3, 2.0)
    with pytest.raises(optuna.TrialPruned, match="the loss at step 4 is nan"):
        callback(4, torch.tensor(math.nan))


DEPRECATED = (
    r"suggest_(uniform|loguniform|discrete_uniform)|constraints_func|set_system_attr|study\.system_attrs|MOTPESampler|"
    r"RedisStorage|JournalFileStorage|RetryFailedTrialCallback|failed_trial_callback|optuna\.(integration|terminator|"
    r"multi_objective)|consider_(prior|magic_clip|endpoints)|prior_weight=|warn_independent_sampling=|axis_order="
)


def test_no_name_that_optuna_5_has_deprecated() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for folder in ("metaopt", "plugins", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for match in re.finditer(DEPRECATED, path.read_text())
    ]
    assert found == []


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "tune")
    arguments = ["tune", "adamw", "--task", "booth", "--trials", "4", "--steps", "20", "--search", "lr", "--out", out]
    assert main([*arguments, "--confirm-seeds", "2", "--schedule", "constant,cosine"]) == 0
    best = json.loads((tmp_path / "tune" / "best.json").read_text())
    assert best["wrappers"] == ["scheduled"] and set(best["values"]) >= {"lr", "schedule"}
    assert main(["export", f"{out}/best.json", "--to", str(tmp_path / "tuned.py")]) == 0
    assert "class Scheduled" in (tmp_path / "tuned.py").read_text()
    assert "next: metaopt race" in capsys.readouterr().err.replace("\n", " ")
    storage = f"journal:{out}/study.log"
    assert main(["worker", "--storage", storage, "--study", "adamw on booth", "--trials", "6"]) == 0
    assert "2 trials were finished here" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "is of a search with wrappers=['scheduled'], not []" in capsys.readouterr().err
