from __future__ import annotations

import math

import numpy as np
import pytest

from metaopt.evaluate import estimate, iqm


def test_iqm_of_known_numbers():
    assert iqm([7.0]) == 7.0
    assert iqm([1.0, 2.0, 6.0]) == 3.0  # fewer than four: the mean
    assert iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert iqm(np.arange(8)[::-1]) == 3.5
    assert iqm([0.0, 1.0, 2.0, 3.0, 1000.0]) == 2.0


def test_a_quarter_of_diverged_runs_is_forgiven_and_more_is_infinite():
    assert iqm([1.0, 2.0, 3.0, math.nan]) == 2.5
    assert iqm([1.0, 2.0, math.inf, math.nan]) == math.inf
    value = estimate([[1.0, 2.0, 3.0, 4.0, math.nan]])
    assert value.iqm == 3.0
    assert value.high == math.inf, "a resample may hold two diverged runs"


def test_all_diverged_gives_infinity_not_nan():
    value = estimate([[math.nan] * 5])
    assert (value.iqm, value.low, value.high) == (math.inf, math.inf, math.inf)


def test_one_seed_gives_no_interval():
    value = estimate([[1.0], [2.0]])
    assert value.iqm == 1.5
    assert math.isnan(value.low) and math.isnan(value.high)


def test_equal_scores_give_width_zero_without_warnings():
    value = estimate([[0.5, 0.5], [2.0, 2.0]])
    assert (value.low, value.iqm, value.high) == (1.25, 1.25, 1.25)


def test_same_scores_same_interval():
    scores = np.random.default_rng(0).normal(size=(3, 5))
    assert estimate(scores) == estimate(scores)
    assert estimate(scores, seed=1) != estimate(scores)


def test_stratified_interval_ignores_the_spread_between_tasks():
    rng = np.random.default_rng(0)
    tasks = [center + 0.01 * rng.normal(size=5) for center in (0.0, 1.0, 2.0, 3.0)]
    stratified = estimate(tasks)
    pooled = estimate([np.concatenate(tasks)])
    assert stratified.iqm == pooled.iqm
    assert stratified.high - stratified.low < 0.05 < pooled.high - pooled.low


@pytest.mark.parametrize(("seeds", "tasks"), [(5, 1), (20, 1), (3, 4)])
def test_interval_covers_the_truth_as_often_as_it_says(seeds, tasks):
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        value = estimate(rng.normal(size=(tasks, seeds)), resamples=500, seed=i)
        covered += value.low <= 0.0 <= value.high
    assert 0.9 <= covered / 200 <= 0.995


def test_no_scores_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        estimate([[1.0], []])
    with pytest.raises(ValueError, match="at least one"):
        iqm([])
