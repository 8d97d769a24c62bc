"""Lengths of episodes: what each schedule draws, from what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from metaopt import registry
from metaopt.meta.truncation import Constant, Growing, LogUniform

SEEDS = torch.arange(20_000)


def test_log_uniform_lengths_follow_scipys_distribution() -> None:
    lengths = LogUniform(100, 2000).lengths(SEEDS, 0)
    assert lengths.dtype == torch.int64
    assert lengths.min() == 100
    assert lengths.max() == 2000
    # whole numbers T are drawn by [T, T + 1), of which the middle is hardly off at 100 and more
    assert stats.kstest(lengths.double() + 0.5, stats.loguniform(100, 2001).cdf).pvalue > 0.01


@pytest.mark.parametrize("schedule", [Constant(7), LogUniform(1, 50), Growing(2, 5, 40, 10)])
def test_a_length_depends_on_its_own_seed_and_window_only(schedule: Any) -> None:
    """Copies on other processes, resumed runs and antithetic signs must agree on when an episode ends."""
    everyone = schedule.lengths(SEEDS, 3)
    assert torch.equal(everyone[[5, 900]], schedule.lengths(torch.tensor([5, 900]), 3))
    assert everyone.min() >= 1


def test_growing_episodes_reach_their_longest_log_linearly() -> None:
    schedule = Growing(shortest=10, longest_at_first=20, longest=2000, windows=100)
    longest = [int(schedule.lengths(SEEDS, window).max()) for window in (0, 50, 100, 1000)]
    assert longest == [20, 200, 2000, 2000]  # 200 is the geometric mean
    assert int(schedule.lengths(SEEDS, 1000).min()) == 10


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("log_uniform", {"shortest": 10, "longest": 5}, "shortest <= longest must hold, got shortest=10, longest=5"),
        ("growing", {"longest_at_first": 9000}, "longest_at_first=9000, longest=2000"),
        ("constant", {"length": 0}, "length must be an integer of at least 1"),
    ],
)
def test_impossible_lengths_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.create("truncation", name, **options)
