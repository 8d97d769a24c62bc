"""The yardstick: whatever a run ends with, it reads as a finite number of AdamW's steps and a bounded score."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaopt import registry
from metaopt.evaluate.baseline import LONGER, Curve, build, measure, read, summary
from metaopt.evaluate.race import race
from metaopt.unroll import start, unroll
from metaopt_classic.adam import AdamW


def curve(losses: tuple[float | None, ...], steps: tuple[int, ...] = (0, 10, 20, 40, 80), horizon: int = 40) -> Curve:
    return Curve("t", "c", "adamw", 0.01, False, horizon, steps, losses)


EXPONENTIAL = curve(tuple(math.exp(-step / 20) for step in (0, 10, 20, 40, 80)))


@given(loss=st.floats(allow_nan=True, allow_infinity=True), losses=st.lists(
    st.none() | st.floats(-1e30, 1e30), min_size=5, max_size=5))  # fmt: skip
def test_every_loss_on_every_curve_has_finite_bounded_scores(loss: float, losses: list[float | None]) -> None:
    found = curve(tuple(losses))
    assert 0 <= found.steps_for(loss) <= 80
    assert -1 <= found.score(loss) <= 2


@given(a=st.floats(0, 2), b=st.floats(0, 2))
def test_a_lower_loss_is_never_worth_less(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert EXPONENTIAL.steps_for(low) >= EXPONENTIAL.steps_for(high)
    assert EXPONENTIAL.score(low) >= EXPONENTIAL.score(high)


def test_the_baselines_own_losses_read_as_their_own_steps_and_its_horizon_scores_one() -> None:
    for step, loss in zip(EXPONENTIAL.steps, EXPONENTIAL.losses, strict=True):
        assert EXPONENTIAL.steps_for(float(loss)) == pytest.approx(step)
    assert EXPONENTIAL.score(math.exp(-2)) == pytest.approx(1.0)
    assert EXPONENTIAL.score(1.0) == 0.0
    assert EXPONENTIAL.steps_for(0.0) == 80, "beyond the curve counts as its end"


def test_a_plateau_counts_from_its_first_step_and_noise_is_averaged_not_minimised() -> None:
    assert curve((1.0, 0.5, 0.5, 0.5, 0.25)).steps_for(0.5) == pytest.approx(10)
    noisy = curve((1.0, 0.6, 0.4, 0.5, 0.25))
    assert noisy.steps_for(0.45) == pytest.approx(20) and noisy.steps_for(0.44) > 40


def test_the_archive_resumes_and_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "adamw.jsonl"
    build(["digits_mlp"], path, progress=False)
    first = path.read_text()
    build(["digits_mlp"], path, progress=False)
    assert path.read_text() == first
    with pytest.raises(ValueError, match="holds curves of adamw, not of lion"):
        build(["digits_mlp"], path, rule="lion", progress=False)
    kept = read(path)["digits_mlp"]
    assert kept.steps[-1] == LONGER * kept.horizon == 400 and kept.horizon in kept.steps
    assert kept.losses[-1] is not None and kept.losses[-1] < 0.3 < float(kept.losses[0] or 0)


def test_an_unknown_task_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(registry.RegistryError, match="digits_mpl"):
        build(["digits_mlp", "digits_mpl"], tmp_path / "adamw.jsonl", progress=False)
    assert not (tmp_path / "adamw.jsonl").exists()


def test_the_curve_is_what_training_at_the_tuned_rate_gives() -> None:
    task = registry.create("task", "quadratic_20")
    found = measure(task, "quadratic_20", AdamW(), "adamw")
    rule = AdamW(lr=found.lr)
    with torch.no_grad():
        runs = start(task, rule, torch.arange(16))
        _, runs = unroll(task, rule, runs, found.horizon)
        final = torch.vmap(lambda p: task.loss(p, {}))(runs.params)
    at_horizon = dict(zip(found.steps, found.losses, strict=True))[found.horizon]
    spread = float(final.std()) * 4 / math.sqrt(3)
    assert abs(float(final.mean()) - float(at_horizon or 0)) <= spread + 1e-3


def test_summary_is_the_mean_over_tasks_and_seeds() -> None:
    losses = [math.exp(-0.5), math.exp(-1)]
    found = summary({"t": EXPONENTIAL}, {"t": losses}, {"t": 40})
    assert found["speedup"] == pytest.approx((10 + 20) / 2 / 40)
    assert found["score"] == pytest.approx(np.mean([EXPONENTIAL.score(loss) for loss in losses]))


def test_a_race_on_archived_tasks_says_what_adamw_would_need() -> None:
    result = race({"adamw": "adamw"}, ["digits_mlp"], seeds=3, grid=7, rounds=1, progress=False)
    found = result.against_adamw["adamw"]
    assert 0.5 < found["speedup"] <= 2 and 0.9 < found["score"] < 1.1
    assert result.protocol["suite_hash"] and result.protocol["asked"] == ["digits_mlp"]
    own = registry.create("task", "digits_mlp", hidden=(8,))
    assert race({"adamw": "adamw"}, [own], seeds=1, grid=0, steps=2, progress=False).against_adamw == {}, (
        "another task under an archived name has no baseline"
    )
