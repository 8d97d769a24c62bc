"""Evolution strategies on whole episodes."""

from __future__ import annotations

from typing import Any

import torch

from metaopt import tree
from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import as_worst, mean_of_live, own_copies, window_metrics
from metaopt.meta.inner import InnerProblem
from metaopt.meta.shard import ALONE, Shard
from metaopt.space import option
from metaopt_learned.estimators.episodes import plan_episodes, run_stretch
from metaopt_learned.estimators.evolution import EvolutionStrategy
from metaopt_learned.estimators.objectives import OBJECTIVES, loss_weights

STEPS_AT_ONCE = 200
"""Longest run in one call, which bounds what an unroll prepares ahead (the indices of its batches)."""


class FullES(EvolutionStrategy):
    r"""Evolution strategies on whole episodes of every pair.

    .. math:: g = \frac{1}{N} \sum_i \frac{L(\theta + \epsilon_i) - L(\theta - \epsilon_i)}{2 \sigma^2} \epsilon_i

    L is the mean, the lowest or the last loss of the episode, or (``recomputed``) the last one judged on fresh batches.
    Unbiased for L smoothed by one perturbation per episode; an outer step costs whole episodes. VeLO was trained so, with
    the recomputed loss and the sign of the difference: Metz et al., 2022 (https://arxiv.org/abs/2211.09760).
    """

    objective: str = option("mean", choices=(*OBJECTIVES, "recomputed"), doc="of the losses of an episode")

    def start(self, inner: InnerProblem, theta: Theta, seed: int, shard: Shard = ALONE) -> dict[str, Any]:
        """Nothing goes on from one estimate to the next."""
        own_copies(self.pairs, "pairs", shard)
        self._deviations(theta)  # refuses names that theta lacks
        return {"seed": torch.tensor(seed), "windows": torch.tensor(0), "copies": {}}

    @torch.no_grad()
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any], shard: Shard = ALONE
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """One episode of every pair."""
        own, center, deviations = own_copies(self.pairs, "pairs", shard), to_vector(theta), self._deviations(theta)
        summed, rows, summing = self._share_of_sum(own, shard)
        eps = self._noise(int(carry["seed"]), int(carry["windows"]), summed, deviations)
        thetas = self._perturbed(center, eps[rows])
        stretches, lengths = plan_episodes(inner, carry, own // self.pairs_per_task, STEPS_AT_ONCE)
        state: dict[str, Any] = {}
        parts = []
        for stretch in stretches:
            part, state = run_stretch(inner, thetas, theta, state, stretch)
            parts.append(part)
        losses = torch.cat(parts, 2)
        if self.objective == "recomputed":
            flat = tree.map_tree(lambda leaf: leaf.flatten(0, 1), state)
            judged = inner.judge(from_vector(thetas.flatten(0, 1), theta), flat).unflatten(0, thetas.shape[:2])
            own_values = torch.where(torch.isfinite(losses).all(2), judged, torch.nan)
        else:
            own_values = (loss_weights(losses, lengths, self.objective) * losses).sum(2)
        found = shard.gather(own_values, self.pairs)  # NaN of an episode with a loss that is not finite
        values = as_worst(found, inner.worst)
        live = torch.isfinite(values).all(1)
        at = summed.to(center.device)
        delta = self._differences(values.unsqueeze(2), live).to(center)[at]
        counted = self._comparable(live).to(center.device)[at]
        gradient, count = mean_of_live(delta * eps / deviations**2, counted, self.clip_task, summing)
        metrics = window_metrics(found, count, self._signs * int(shard.sum(lengths.sum())), inner.worst)
        return from_vector(gradient, theta), {**carry, "windows": carry["windows"] + 1}, metrics
