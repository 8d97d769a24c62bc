"""Truncated evolution strategies."""

from __future__ import annotations

from metaopt_learned.estimators.windowed import WindowedStrategy


class TruncatedES(WindowedStrategy):
    r"""Evolution strategies on windows of K steps; biased towards short horizons, but of low variance.

    .. math:: g = \frac{1}{N} \sum_i \frac{L(\theta + \epsilon_i) - L(\theta - \epsilon_i)}{2 \sigma^2} \epsilon_i,
        \qquad \epsilon_i \sim N(0, \sigma^2 I)

    L is the mean loss of the window; both signs start from one state, and the + run carries on. What theta did before the
    window is ignored. Metz et al., 2019 (https://arxiv.org/abs/1810.10180).
    """

    @property
    def _kept_signs(self) -> int:
        return 1
