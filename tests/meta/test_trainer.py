"""Meta-training: several tasks, divergence, freezing, evaluation, early stop; resumed runs equal unbroken ones to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from metaopt import registry
from metaopt.cli import main
from metaopt.evaluate.baseline import baseline_of
from metaopt.meta import trainer
from metaopt.meta.config import MetaTrainConfig, TaskChoice, make_config, read_settings
from metaopt.meta.evaluation import Evaluation
from metaopt.meta.run_log import LiveView
from metaopt.meta.shard import ALONE
from metaopt.meta.trainer import meta_train
from metaopt.resolve import load_theta, resolve_rule
from metaopt.unroll import start, unroll

QUADRATIC = TaskChoice("quadratic", {"dim": 4})
EXPLODING = f"{Path(__file__).parent / 'trainer_tasks.py'}:exploding"
SMALL = MetaTrainConfig(
    tasks=[QUADRATIC], learned_options={"hidden": 4, "step_scale": 0.01}, horizon=13,
    estimator_options={"pairs": 3, "window": 5}, outer_steps=12, outer_lr=0.01, warmup=3, checkpoint_every=4,
)  # fmt: skip
EVERYTHING = dataclasses.replace(
    SMALL,
    tasks=["iris_mlp", "digits_mlp", "quadratic_20"], tasks_per_step=2, curriculum="regret",
    estimator_options={"pairs": 2, "window": 3}, horizon=None, truncation="growing",
    truncation_options={"shortest": 2, "longest_at_first": 4, "longest": 9, "windows": 5},
    ema_decay=0.8, freeze=["momentum_decays"], evaluate_every=3, evaluate_on=["iris_mlp"], outer_rule="adamw",
    outer_options={"weight_decay": 0.1}, schedule="linear",
)  # fmt: skip


def run_of(config: MetaTrainConfig) -> trainer._Run:
    return trainer._Run(config, ALONE, None)


def same(x: Any, y: Any) -> bool:
    """Nested values are equal, tensors to the bit."""
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list):
        return isinstance(y, list) and len(x) == len(y) and all(map(same, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_same_ending(one: Path, other: Path) -> None:
    """Every artefact but wall-clock times is equal."""
    a, b = (torch.load(path / trainer.CHECKPOINT_FILE, weights_only=True) for path in (one, other))
    assert same(a, b)
    thetas = [sorted(path.glob("*.safetensors")) for path in (one, other)]
    assert [path.name for path in thetas[0]] == [path.name for path in thetas[1]]
    for left, right in zip(*thetas, strict=True):
        assert left.read_bytes() == right.read_bytes()
    logs = [[json.loads(line) for line in (p / trainer.METRICS_FILE).read_text().splitlines()] for p in (one, other)]
    for left, right in zip(*logs, strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, estimator="es"), EVERYTHING])
def test_interrupted_run_ends_where_the_unbroken_one_does(
    config: MetaTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta_train(config, tmp_path / "unbroken", progress=False)
    advance = trainer._Run.advance

    def interrupted_in_the_sixth(run: trainer._Run) -> dict[str, Any]:
        if run.step == 5:
            signal.raise_signal(signal.SIGINT)
        return advance(run)

    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "advance", interrupted_in_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            meta_train(config, tmp_path / "broken", progress=False)
    saved = torch.load(tmp_path / "broken" / trainer.CHECKPOINT_FILE, weights_only=True)
    assert saved["step"] == 6, "Ctrl-C saves what was reached, not the last multiple of checkpoint_every"
    meta_train(config, tmp_path / "broken", progress=False)
    assert_same_ending(tmp_path / "unbroken", tmp_path / "broken")


def test_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = meta_train(SMALL, tmp_path, progress=False)
    again = meta_train(SMALL, tmp_path, progress=False)
    assert len(again.metrics) == SMALL.outer_steps
    assert same(first.theta, again.theta)


def test_directory_of_another_run_is_refused_by_name_of_the_difference(tmp_path: Path) -> None:
    meta_train(dataclasses.replace(SMALL, outer_steps=1), tmp_path, progress=False)
    with pytest.raises(
        ValueError, match=r"outer_lr=0.01, not 0.02; give the same settings to resume it, or choose another directory"
    ):
        meta_train(dataclasses.replace(SMALL, outer_steps=1, outer_lr=0.02), tmp_path, progress=False)


@pytest.mark.parametrize("estimator", ["pes", "es"])
def test_meta_training_improves_unseen_runs(estimator: str, tmp_path: Path) -> None:
    options = {"dim": 5, "condition": 10.0}
    config = MetaTrainConfig(
        tasks=[TaskChoice("quadratic", options)], learned_options={"step_scale": 0.05}, horizon=30,
        estimator=estimator, estimator_options={"pairs": 16, "window": 10}, outer_steps=120, outer_lr=0.02,
    )  # fmt: skip
    trained = meta_train(config, tmp_path, progress=False)
    task = registry.create("task", "quadratic", **options).sample(torch.Generator().manual_seed(0))
    untrained = trained.learned.bind(trained.learned.init_theta(torch.Generator().manual_seed(0)))
    seeds = torch.arange(10_000, 10_016)
    with torch.no_grad():
        ends = [
            unroll(task, rule, start(task, rule, seeds), 30)[0][:, -1] for rule in (untrained, load_theta(tmp_path))
        ]
    assert ends[1].mean() < 0.2 * ends[0].mean()


# --- several tasks ------------------------------------------------------------------------------------------------------


def test_theta_moves_by_the_mean_of_the_tasks_gradients() -> None:
    config = dataclasses.replace(
        SMALL, tasks=[QUADRATIC, "iris_mlp"], outer_rule="sgd", outer_lr=0.5, warmup=0, schedule="constant", clip_norm=0
    )
    run, twin = run_of(config), run_of(config)
    before = {name: value.clone() for name, value in run.theta.items()}
    gradients = [task.estimate(twin.estimator, twin.theta, ALONE)[0] for task in twin.tasks]
    run.advance()
    for name, value in run.theta.items():
        expected = before[name] - 0.5 * (gradients[0][name] + gradients[1][name]) / 2
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_a_large_gradient_is_scaled_down_to_clip_norm() -> None:
    config = dataclasses.replace(SMALL, outer_rule="sgd", outer_lr=1.0, warmup=0, clip_norm=1e-3)
    run = run_of(config)
    before = torch.cat([value.flatten() for value in run.theta.values()])
    line = run.advance()
    after = torch.cat([value.flatten() for value in run.theta.values()])
    assert line["gradient_norm"] > 1e-3
    # the moves are 1e-3 in all, of numbers of size 1 in float32
    torch.testing.assert_close((after - before).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_each_run_of_a_stacking_family_trains_a_member_of_its_own() -> None:
    run = run_of(SMALL)
    run.advance()
    carry = run.tasks[0].carry
    assert carry is not None
    optima = carry["copies"]["state"]["run"]["config"]["x_star"].reshape(3, 2, 4)
    assert torch.equal(optima[:, 0], optima[:, 1]), "both signs of a pair train the same member"
    assert len(optima[:, 0].unique(dim=0)) == 3


def test_a_family_that_does_not_stack_trains_one_member_after_the_other() -> None:
    ranges = {"hidden": [[3], [5]], "data": ["iris"], "batch_size": [4], "horizon": {"low": 5, "high": 500}}
    config = dataclasses.replace(
        SMALL, tasks=[TaskChoice("mlp_classifier", {"ranges": ranges})], resample_every=2, horizon=None
    )
    run = run_of(config)
    (task,) = run.tasks
    horizons, windows = [], []
    for _ in range(6):
        run.advance()
        assert task.carry is not None and task._inner is not None
        horizons.append(task._inner[1].task.horizon)
        windows.append(int(task.carry["windows"]))
    assert windows == [1, 2] * 3, "a new member begins with fresh runs"
    assert horizons[::2] == horizons[1::2]
    assert len(set(horizons)) == 3
    assert task._inner is not None and task._inner[1].windows_before == 4, "the truncation schedule goes on"


def test_regret_is_the_last_loss_less_that_of_tuned_adamw() -> None:
    config = dataclasses.replace(EVERYTHING, evaluate_every=0, evaluate_on=())
    run = run_of(config)
    line = run.advance()
    labels = ["iris_mlp", "digits_mlp", "quadratic_20"]
    for label, regret, task in zip(labels, run.regret.tolist(), run.tasks, strict=True):
        baseline = task.baseline("mean")
        assert baseline is not None
        assert 0 < baseline < 1.1, "a few steps from untrained, 1"
        assert regret == (line["losses"][label] - baseline if label in line["losses"] else math.inf)
    assert len(line["losses"]) == 2
    assert run.taken.tolist() == [int(label in line["losses"]) for label in labels]


def test_regret_compares_with_adamw_in_episodes_of_the_expected_length_and_at_what_the_estimator_reports() -> None:
    drawn = dataclasses.replace(EVERYTHING, truncation="log_uniform", truncation_options={"shortest": 2, "longest": 9})
    # scipy.stats.loguniform(2, 10).mean() - 0.5 = 4.47 steps
    fixed = dataclasses.replace(EVERYTHING, truncation="constant", truncation_options={}, horizon=4)
    one, other = (run_of(config).tasks[1].baseline("mean") for config in (drawn, fixed))
    assert one == other
    (task,) = run_of(dataclasses.replace(SMALL, tasks=["digits_mlp"], horizon=20)).tasks
    found = [task.baseline(objective) for objective in ("mean", "last", "min", "recomputed")]
    assert all(value is not None for value in found)
    mean, last, lowest, recomputed = (value or 0.0 for value in found)
    assert recomputed < last == lowest < mean, "of a falling curve"


def test_suites_become_their_tasks() -> None:
    config = dataclasses.replace(SMALL, tasks=["suite:fast", QUADRATIC])
    assert len(config.tasks) == 14
    assert config.task_choices[-1] == QUADRATIC


# --- divergence ---------------------------------------------------------------------------------------------------------


def test_copies_that_diverge_are_counted_and_never_stop_or_zero_a_step(tmp_path: Path) -> None:
    """One task of the peers' with a NaN makes the whole meta-gradient zero; here 16 pairs each diverge with p = 0.05."""
    exploding = TaskChoice(EXPLODING, {"rate": 0.01})  # 5 steps a window
    config = dataclasses.replace(
        SMALL, tasks=[exploding], estimator_options={"pairs": 16, "window": 5}, outer_steps=100, horizon=20
    )
    result = meta_train(config, tmp_path, progress=False)
    assert result.skipped == 0
    assert all(0 < line["gradient_norm"] < math.inf for line in result.metrics)
    # 1600 windows of pairs, each diverging with 0.049: four standard deviations
    assert abs(result.diverged[EXPLODING] - 78) < 35
    assert all(torch.isfinite(value).all() for value in result.theta.values())


def test_a_task_without_a_live_copy_is_left_out_of_the_mean_and_a_step_without_a_task_changes_nothing() -> None:
    dead = TaskChoice(EXPLODING, {"rate": 1.0})
    both, alone, hopeless = (
        run_of(dataclasses.replace(SMALL, tasks=tasks)) for tasks in ([QUADRATIC, dead], [QUADRATIC], [dead])
    )
    lines = both.advance(), alone.advance()
    assert same(both.theta, alone.theta)
    assert lines[0]["gradient_norm"] == lines[1]["gradient_norm"]
    assert lines[0]["diverged"] == {"quadratic": 0, EXPLODING: 3}
    assert (lines[0]["left_out"], lines[1]["left_out"]) == ([EXPLODING], [])
    assert both.regret[1] == both.regret[0] == lines[0]["losses"]["quadratic"], "the worst that is known"
    before = {name: value.clone() for name, value in hopeless.theta.items()}
    line = hopeless.advance()
    assert line["skipped"]
    assert line["meta_loss"] is None
    assert hopeless.regret[0] == math.inf, "nothing is known"
    assert same(hopeless.theta, before)
    assert all(slots["step"] == 0 for slots in hopeless.outer_state.values())


def test_diverged_copies_count_as_the_worst_loss_if_wanted() -> None:
    run = run_of(dataclasses.replace(SMALL, tasks=[TaskChoice(EXPLODING, {"rate": 1.0})], on_divergence="worst"))
    line = run.advance()
    assert line["meta_loss"] == 1.5
    assert (line["diverged"], line["worst"]) == ({EXPLODING: 0}, {EXPLODING: 3})
    carry = run.tasks[0].carry
    assert carry is not None
    assert carry["copies"]["left"].tolist() == [0, 0, 0], "they begin anew with the next window"


# --- theta: frozen parts, two phases, moving average ----------------------------------------------------------------------


def test_frozen_entries_stay_as_they_are_and_the_second_phase_begins_with_the_first_ones_theta(tmp_path: Path) -> None:
    first = meta_train(dataclasses.replace(SMALL, freeze=["b*"]), tmp_path / "one", progress=False)
    fresh = first.learned.init_theta(torch.Generator().manual_seed(0))
    frozen = {name for name in fresh if name.startswith("b")}
    assert {name for name in fresh if torch.equal(fresh[name], first.theta[name])} == frozen
    assert 0 < len(frozen) < len(fresh)
    config = dataclasses.replace(SMALL, init_theta=str(tmp_path / "one"), freeze=["w*"], outer_steps=2)
    second = meta_train(config, tmp_path / "two", progress=False)
    kept = {name for name in fresh if torch.equal(first.theta[name], second.theta[name])}
    assert kept == {name for name in fresh if name.startswith("w")}
    assert list(second.theta) == list(fresh)


@pytest.mark.parametrize("estimator", ["pes", "truncated_unroll"])
def test_a_frozen_part_acts_in_the_inner_runs_and_is_not_perturbed(estimator: str) -> None:
    """The meta-gradient of the trained part is that of the whole theta, where nothing is drawn for the frozen one."""
    options = {"pairs": 2, "window": 4} if estimator == "pes" else {"window": 4}
    config = dataclasses.replace(SMALL, estimator=estimator, estimator_options=options, freeze=["w0"])
    run = run_of(config)
    (task,) = run.tasks
    trained = run.trained
    assert "w0" not in trained
    gradient, metrics = task.estimate(run.estimator, trained, ALONE)
    assert gradient.keys() == trained.keys()
    other = run_of(config)
    other.tasks[0]._frozen["w0"].mul_(3)  # if this made no difference, the part would be missing
    _, changed = other.tasks[0].estimate(other.estimator, trained, ALONE)
    assert changed["meta_loss"] != metrics["meta_loss"]


def test_the_moving_average_is_that_of_the_formula() -> None:
    run = run_of(dataclasses.replace(SMALL, ema_decay=0.7))
    mean = {name: value.double() for name, value in run.theta.items()}
    for _ in range(5):
        run.advance()
        mean = {name: 0.7 * mean[name] + 0.3 * value.double() for name, value in run.theta.items()}
    for name, value in run.result.items():
        torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, run.theta[name])


# --- evaluation ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted_scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the evaluations say, one after the other."""
    script: list[float] = []
    monkeypatch.setattr(Evaluation, "scores", lambda self, rule, shard: {"iris_mlp": script.pop(0)})
    yield script


EVALUATED = dataclasses.replace(SMALL, evaluate_every=2, evaluate_on=["iris_mlp"])


def test_the_best_theta_is_what_the_run_gives(tmp_path: Path, scripted_scores: list[float]) -> None:
    scripted_scores += [0.1, 0.7, 0.3, 0.7, 0.2, 0.5]
    told: list[tuple[int, float]] = []
    result = meta_train(
        EVALUATED, tmp_path / "a", progress=False, on_evaluation=lambda step, score: told.append((step, score))
    )
    assert result.best == (0.7, 4), "of equals the first"
    assert told == [(2, 0.1), (4, 0.7), (6, 0.3), (8, 0.7), (10, 0.2), (12, 0.5)]
    run = run_of(SMALL)
    for _ in range(4):
        run.advance()
    assert same(result.theta, run.theta)
    assert same(load_theta(tmp_path / "a").theta, run.theta)
    for _ in range(8):
        run.advance()
    assert same(load_theta(tmp_path / "a" / trainer.LAST_THETA_FILE).theta, run.theta)


def test_a_run_stops_after_so_many_evaluations_without_a_new_best(tmp_path: Path, scripted_scores: list[float]) -> None:
    config = dataclasses.replace(EVALUATED, patience=2)
    scripted_scores += [0.5, 0.4, 0.6, 0.1, 0.2, 9.0]
    result = meta_train(config, tmp_path, progress=False)
    assert len(result.metrics) == 10
    assert result.best == (0.6, 6)
    again = meta_train(config, tmp_path, progress=False)
    assert len(again.metrics) == 10, "stopped is finished"


def test_scores_say_zero_for_untrained_and_one_for_tuned_adamw() -> None:
    evaluation = Evaluation([TaskChoice("iris_mlp"), QUADRATIC], 4, 0, "cpu", "auto")
    curve = baseline_of("iris_mlp")
    assert curve is not None
    adamw = evaluation.scores(resolve_rule("adamw", lr=curve.lr), ALONE)
    idle = evaluation.scores(resolve_rule("sgd", lr=0.0), ALONE)
    assert abs(idle["iris_mlp"]) < 0.1
    assert abs(adamw["iris_mlp"] - 1) < 0.2, "the archive is of other seeds and the test split"
    assert idle["quadratic"] < 0.3 < 0.8 < adamw["quadratic"], "without a curve: 1 minus the normalised loss"


def test_a_score_that_is_no_number_is_the_worst() -> None:
    evaluation = Evaluation([TaskChoice(EXPLODING.replace("exploding", "unjudged"))], 2, 0, "cpu", "auto")
    assert list(evaluation.scores(resolve_rule("sgd"), ALONE).values()) == [-1.0]


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer_steps": 0}, "outer_steps must be at least 1"),
        ({"outer_lr": 0.0}, "outer_lr must be above 0"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine, got 'step'"),
        ({"on_divergence": "ignore"}, "on_divergence must be one of exclude, worst"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": "digits_mlp"}, r"tasks must be a list, got 'digits_mlp'; write \['digits_mlp'\]"),
        ({"tasks": [{"task": "digits_mlp"}]}, "tasks holds names, or mappings with name and options"),
        ({"tasks": ["suite:tset"]}, "no suite is called 'tset'"),
        ({"tasks": ["suite:test"]}, "held-out suite"),
        ({"tasks": [TaskChoice("augmented", {"ranges": {"task": ["faces_mlp", "faces_conv"]}})]}, "held-out suite"),
        ({"tasks": [TaskChoice("digits_mlp", {"data": "faces"})]}, "data source 'faces' is held out"),
        ({"tasks": [TaskChoice("rescaled", {"options": {"data": "faces"}})]}, "data source 'faces' is held out"),
        ({"tasks": [TaskChoice("rescaled", {"task": "faces_conv"})]}, "held-out suite"),
        ({"evaluate_on": ["faces_conv"], "evaluate_every": 5}, "held-out suite"),
        ({"evaluate_every": 5}, "evaluate_every and evaluate_on go together"),
        ({"patience": 5}, "patience counts evaluations, got 5 and none"),
        ({"tasks_per_step": 2}, r"tasks_per_step must be in \[1, 1\], got 2"),
        ({"truncation": "log_uniform"}, "truncation 'log_uniform' has lengths of its own"),
        ({"truncation_options": {"length": 3}}, "its length is horizon"),
        ({"seed": "a"}, "seed must be an integer, got 'a'; write 10"),
        ({"clip_norm": None}, "clip_norm must be a number, got None"),
        ({"tasks_per_step": "a"}, "tasks_per_step must be an integer, got 'a'"),
        ({"freeze": 7}, "freeze must be a list, got 7"),
        ({"freeze": [7]}, "a pattern in freeze must be text, got 7"),
        ({"learned_options": 3}, "learned_options must be a table of names and values, got 3"),
        ({"outer_steps": 2.0}, "outer_steps must be an integer, got 2.0"),
        ({"warmup": True}, "warmup must be an integer, got True"),
        ({"outer_options": {"lr": 1.0}}, "outer_options must not hold 'lr', got 1.0; set outer_lr"),
        ({"outer_options": {"horizon": 9}}, "outer_options must not hold 'horizon', got 9; set outer_steps"),
        ({"tasks": [TaskChoice("iris_mlp", {"device": "cpu"})]}, "options of iris_mlp must not hold 'device'"),
        ({"tasks": [{"name": "iris_mlp", "options": 3}]}, "options of iris_mlp must be a table of names and values"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ["w9"]}, "freeze names 'w9', but theta has only"),
        ({"freeze": ["*"]}, "freeze leaves nothing of theta to train"),
        ({"init_theta": "nowhere"}, "no meta-parameters at nowhere"),
        ({"outer_rule": EXPLODING.replace("exploding", "sharpness_aware")}, "evaluates the meta-loss again"),
        ({"curriculum": "regret"}, "no archived curve on quadratic as it is set"),
        ({"evaluate_on": ["mlp_classifier"], "evaluate_every": 1}, "members of 'mlp_classifier' do not stack"),
    ],
)
def test_what_cannot_run_is_refused_and_claims_no_directory(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        meta_train(dataclasses.replace(SMALL, **change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_in_its_first_step_claims_no_directory(tmp_path: Path) -> None:
    wrong = dataclasses.replace(SMALL, estimator_options={"pairs": 3, "window": 5, "sigma_scale": (("nothing", 2.0),)})
    with pytest.raises(ValueError, match="sigma_scale names 'nothing'"):
        meta_train(wrong, tmp_path, progress=False)
    assert len(meta_train(SMALL, tmp_path, progress=False).metrics) == 12


def test_theta_of_another_architecture_is_refused(tmp_path: Path) -> None:
    meta_train(dataclasses.replace(SMALL, outer_steps=1), tmp_path / "narrow", progress=False)
    wide = dataclasses.replace(SMALL, learned_options={"hidden": 8}, init_theta=str(tmp_path / "narrow"))
    with pytest.raises(ValueError, match="give the learned optimizer and the options that it was trained with"):
        meta_train(wide, tmp_path / "wide", progress=False)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_outer_learning_rates_are_those_of_torchs_schedulers(schedule: str) -> None:
    config = dataclasses.replace(SMALL, outer_steps=50, warmup=10, schedule=schedule, final_lr_ratio=0.1, outer_lr=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5)
    after: torch.optim.lr_scheduler.LRScheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 40),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.05),
    }[schedule]()
    for step in range(10, 50):
        assert config.lr_at(step) == pytest.approx(after.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        after.step()
    assert [config.lr_at(step) for step in range(11)] == pytest.approx([0.05 * (i + 1) for i in range(10)] + [0.5])


def test_a_file_of_settings_says_the_same_as_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.toml").write_text(
        """
        learned_options = { hidden = 4, step_scale = 0.01 }
        tasks = [{ name = "quadratic", options = { dim = 4 } }, "iris_mlp"]
        estimator_options = { pairs = 3, window = 5 }
        horizon = 13
        outer_steps = 99
        outer_options = { weight_decay = 0.5 }
        outer_rule = "adamw"
        """
    )
    out, twin = tmp_path / "file", tmp_path / "flags"
    assert main(["meta-train", "--config", str(tmp_path / "settings.toml"), "--steps", "2", "--out", str(out)]) == 0
    flags = "--task quadratic --set-task dim=4 --set-learned hidden=4 --set-learned step_scale=0.01 --horizon 13 "
    flags += "--set-estimator pairs=3 --set-estimator window=5 --steps 2 --outer-rule adamw"
    assert main(["meta-train", *flags.split(), "--set", "outer_options={'weight_decay': 0.5}", "--out", str(twin)]) == 0
    there, here = (json.loads((path / trainer.CONFIG_FILE).read_text()) for path in (out, twin))
    assert there.pop("tasks") == [*here.pop("tasks"), {"name": "iris_mlp", "options": {}}]
    assert there == here
    assert "metaopt race" in capsys.readouterr().out


def test_settings_take_back_what_a_file_says(tmp_path: Path) -> None:
    first = meta_train(dataclasses.replace(SMALL, outer_steps=1), tmp_path / "first", progress=False)
    (tmp_path / "settings.toml").write_text(
        f"""
        learned_options = {{ hidden = 4 }}
        tasks = [{{ name = "quadratic", options = {{ dim = 4 }} }}]
        estimator_options = {{ pairs = 3, window = 5 }}
        outer_options = {{ betas = [0.8, 0.9] }}
        horizon = 13
        outer_steps = 1
        freeze = ["w*"]
        init_theta = "{first.directory}"
        """
    )
    given = ["freeze=[]", "horizon=None", "init_theta=None", "outer_options={}"]
    command = ["meta-train", "--config", str(tmp_path / "settings.toml"), "--out", str(tmp_path / "run")]
    assert main([*command, *(part for setting in given for part in ("--set", setting))]) == 0
    there = json.loads((tmp_path / "run" / trainer.CONFIG_FILE).read_text())
    assert [there[name] for name in ("freeze", "horizon", "init_theta", "outer_options")] == [[], None, None, {}]
    assert there["learned_options"] == {"hidden": 4}


def test_unknown_settings_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta-training has no setting 'outer_step'; did you mean 'outer_steps'"):
        make_config({"outer_step": 3})
    (tmp_path / "broken.toml").write_text("tasks = [")
    with pytest.raises(ValueError, match="is no TOML"):
        read_settings(tmp_path / "broken.toml")
    with pytest.raises(ValueError, match="there is no file"):
        read_settings(tmp_path / "none.toml")


def test_the_live_view_shows_families_with_their_last_scores() -> None:
    lines = [
        {"step": step, "meta_loss": 1.0, "families": {"mlp": 0.5, "conv": None if step == 1 else 0.25}, "diverged": {},
         "seconds": 1.0, "inner_steps": 10} for step in (1, 2)
    ]  # fmt: skip
    lines[0]["evaluation"] = {"score": 0.125, "families": {"rnn": 0.125}}
    view = LiveView(10, lines, show=False)
    console = Console(width=60)
    with console.capture() as shown:
        console.print(view._view())
    rows = [line.split() for line in shown.get().splitlines()[-4:]]
    assert rows == [["family", "loss", "last", "score"], ["conv", "0.2500"], ["mlp", "0.5000"], ["rnn", "0.125"]]


def test_tensorboard_gets_the_numbers_of_the_log_or_a_sentence(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, outer_steps=2)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'torch-metaopt\[tensorboard\]'"):
            meta_train(config, tmp_path, progress=False, tensorboard=True)
    else:
        meta_train(config, tmp_path, progress=False, tensorboard=True)
        assert list((tmp_path / "tensorboard").glob("events*"))
