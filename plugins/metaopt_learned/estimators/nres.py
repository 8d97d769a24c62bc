"""Evolution strategies with one perturbation per episode."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt_learned.estimators.episodes import Stretch, episode_noise
from metaopt_learned.estimators.windowed import WindowedStrategy


class NRES(WindowedStrategy):
    r"""Noise-reuse evolution strategies: a pair keeps its perturbation for a whole episode.

    .. math:: g = \frac{1}{N} \sum_i \frac{1}{2 \sigma^2 K} \sum_{t} (L^+_{i,t} - L^-_{i,t})\, \epsilon_i^{(e(t))}

    where e(t) is the episode that step t belongs to. Unbiased for the loss smoothed by one perturbation per episode, and
    of lower variance than PES where the gradients of an episode's windows point the same way; nothing accumulates.
    Li et al., 2023 (https://arxiv.org/abs/2304.10153); ES-Single of Vicol et al., 2023, is the same.
    """

    def _window_noise(self, carry: dict[str, Any], stretches: list[Stretch], own: Tensor, deviations: Tensor) -> Tensor:
        return deviations * episode_noise(int(carry["seed"]), stretches, own, len(deviations), deviations)
