"""Interquartile means and bootstrap intervals for few, skewed, sometimes infinite scores.

The interquartile mean (IQM) drops a quarter of the scores at either end (``floor(n / 4)`` of them, so with fewer than
four scores it is the mean) and averages the rest. Intervals are stratified bootstraps as in rliable (Agarwal et al.,
"Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021): the seeds of each task are resampled
within that task, so the interval speaks of other seeds on these tasks, not of other tasks.

With few seeds a plain percentile interval is too narrow: its spread is short by ``sqrt((n - 1) / n)`` and it takes
normal tails for Student's. We widen its level by Hesterberg's expansion ("What Teachers Should Know About the
Bootstrap", 2015): cut at ``Phi(-sqrt(n / (n - 1)) t)``, with t Student's quantile. A bootstrap still cannot leave the
range of what it saw: n seeds of one task cover their median with at most ``1 - 2^(1 - n)`` (two seeds 50 %, three 75 %,
five 94 %). One seed gives no interval (NaN), never a false one of width zero.

Loss of a diverged run is +inf here: it counts as worse than every other. An IQM forgives up to a quarter of such runs,
which is why reports print the number of diverged runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_INFINITE = 1e120  # stands for +inf, for which inf - inf would be NaN; beyond float32, and its square is finite
_INFINITE_FROM = 1e100


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean and its 95 % interval; infinite where too many runs diverged, NaN bounds from one seed."""

    iqm: float
    low: float
    high: float
    count: int


def iqm(scores: Sequence[float] | np.ndarray) -> float:
    """Interquartile mean; NaN counts as +inf.

    Raises:
        ValueError: no scores.
    """
    values = _finite(scores)
    if not len(values):
        raise ValueError("an interquartile mean needs at least one score, got none; run at least one seed")
    return _restore(_iqm(values))


def estimate(
    strata: Sequence[Sequence[float]] | Sequence[np.ndarray],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """IQM of all scores together, with a bootstrap interval stratified by task.

    Args:
        strata: one sequence of scores per task (one in all for a per-task estimate); NaN counts as +inf.
        level: coverage aimed at.
        resamples: bootstrap resamples.
        seed: of the resampling, so that equal scores give equal intervals.

    Raises:
        ValueError: a task without scores.
    """
    from scipy import stats  # here and below: slow to import, and not every run has statistics

    samples = [_finite(scores) for scores in strata]
    if not samples or not all(len(sample) for sample in samples):
        raise ValueError("every task needs at least one score for an estimate; run at least one seed on each")
    value = _restore(_iqm(np.concatenate(samples)))
    count = sum(len(sample) for sample in samples)
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, math.nan, math.nan, count)
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(value, value, value, count)
    result = stats.bootstrap(
        samples,
        lambda *parts, axis: _iqm(np.concatenate(parts, axis=axis), axis=axis),
        n_resamples=resamples,
        vectorized=True,
        method="percentile",
        confidence_level=_expanded(level, [len(sample) for sample in samples]),
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Estimate(value, _restore(low), _restore(high), count)


def _iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    from scipy import stats

    return stats.trim_mean(values, 0.25, axis=axis)


def _expanded(level: float, sizes: list[int]) -> float:
    """Hesterberg's expanded level; degrees of freedom add up over tasks, the variance factor is that of the mean n."""
    from scipy import stats

    freedom = sum(size - 1 for size in sizes)
    quantile = stats.t.ppf((1 + level) / 2, freedom) * math.sqrt(sum(sizes) / freedom)
    return min(1 - 2 * float(stats.norm.cdf(-quantile)), 1 - 1e-9)


def _finite(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=_INFINITE, posinf=_INFINITE)


def _restore(value: float | np.ndarray) -> float:
    return math.inf if float(value) > _INFINITE_FROM else float(value)
