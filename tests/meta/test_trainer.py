"""Meta-training resumes bit for bit, learns something, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metaopt import registry
from metaopt.meta import trainer
from metaopt.meta.trainer import MetaTrainConfig, meta_train
from metaopt.resolve import load_theta
from metaopt.unroll import start, unroll

SMALL = MetaTrainConfig(
    task="quadratic", task_options={"dim": 4}, learned_options={"hidden": 4, "step_scale": 0.01}, horizon=13,
    estimator_options={"pairs": 3, "window": 5}, outer_steps=12, outer_lr=0.01, warmup=3, checkpoint_every=4,
)  # fmt: skip


def _same_ending(one: Path, other: Path) -> None:
    """Every artefact but wall-clock times is equal, to the bit."""
    a, b = (torch.load(path / trainer.CHECKPOINT_FILE, weights_only=True) for path in (one, other))

    def compare(x: object, y: object) -> None:
        if isinstance(x, dict):
            assert isinstance(y, dict)
            assert x.keys() == y.keys()
            for key in x:
                compare(x[key], y[key])
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y)  # type: ignore[arg-type]
        elif isinstance(x, list):
            assert isinstance(y, list)
            for left, right in zip(x, y, strict=True):
                compare(left, right)
        else:
            assert x == y

    compare(a, b)
    assert (one / trainer.THETA_FILE).read_bytes() == (other / trainer.THETA_FILE).read_bytes()
    logs = [[json.loads(line) for line in (p / trainer.METRICS_FILE).read_text().splitlines()] for p in (one, other)]
    for left, right in zip(*logs, strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}


@pytest.mark.parametrize("estimator", ["pes", "es"])
def test_interrupted_run_ends_where_the_unbroken_one_does(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, estimator=estimator)
    meta_train(config, tmp_path / "unbroken", progress=False)
    advance = trainer._Run.advance

    def interrupted_after_six(run: trainer._Run) -> dict[str, object]:
        if run.step == 6:
            raise KeyboardInterrupt
        return advance(run)

    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "advance", interrupted_after_six)
        with pytest.raises(KeyboardInterrupt):
            meta_train(config, tmp_path / "broken", progress=False)
    saved = torch.load(tmp_path / "broken" / trainer.CHECKPOINT_FILE, weights_only=True)
    assert saved["step"] == 6, "Ctrl-C saves what was reached, not the last multiple of checkpoint_every"
    meta_train(config, tmp_path / "broken", progress=False)
    _same_ending(tmp_path / "unbroken", tmp_path / "broken")


def test_killed_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL: nothing could be saved; the metrics beyond the last checkpoint are made again, not doubled."""
    config = dataclasses.replace(SMALL, outer_steps=60, checkpoint_every=7)
    program = (
        "import json, sys; from metaopt.meta.trainer import MetaTrainConfig, meta_train; import torch; "
        "torch.set_num_threads(1); meta_train(MetaTrainConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=False)"
    )
    arguments = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(config)), str(tmp_path / "killed")]
    process = subprocess.Popen(arguments)
    log = tmp_path / "killed" / trainer.METRICS_FILE
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 17):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / trainer.THETA_FILE).exists(), "the kill must come before the end"
    meta_train(config, tmp_path / "killed", progress=False)
    meta_train(config, tmp_path / "unbroken", progress=False)
    _same_ending(tmp_path / "unbroken", tmp_path / "killed")


def test_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = meta_train(SMALL, tmp_path, progress=False)
    again = meta_train(SMALL, tmp_path, progress=False)
    assert len(again.metrics) == SMALL.outer_steps
    assert all(torch.equal(first.theta[name], again.theta[name]) for name in first.theta)


def test_directory_of_another_run_is_refused_by_name_of_the_difference(tmp_path: Path) -> None:
    meta_train(SMALL, tmp_path, progress=False)
    with pytest.raises(
        ValueError, match=r"outer_lr=0.01, not 0.02; give the same settings to resume it, or choose another directory"
    ):
        meta_train(dataclasses.replace(SMALL, outer_lr=0.02), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"outer_steps": 0}, "outer_steps must be at least 1"), ({"outer_lr": 0.0}, "outer_lr must be above 0"),
     ({"horizon": 0}, "horizon must be at least 1")],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["pes", "es"])
def test_meta_training_improves_unseen_runs(estimator: str, tmp_path: Path) -> None:
    config = MetaTrainConfig(
        task="quadratic", task_options={"dim": 5, "condition": 10.0}, learned_options={"step_scale": 0.05}, horizon=30,
        estimator=estimator, estimator_options={"pairs": 16, "window": 10}, outer_steps=120, outer_lr=0.02,
    )  # fmt: skip
    trained = meta_train(config, tmp_path, progress=False)
    family = registry.create("task", "quadratic", **config.task_options)
    task = family.sample(torch.Generator().manual_seed(0))
    untrained = trained.learned.bind(trained.learned.init_theta(torch.Generator().manual_seed(0)))
    seeds = torch.arange(10_000, 10_016)
    with torch.no_grad():
        ends = [
            unroll(task, rule, start(task, rule, seeds), 30)[0][:, -1] for rule in (untrained, load_theta(tmp_path))
        ]
    assert ends[1].mean() < 0.2 * ends[0].mean()
