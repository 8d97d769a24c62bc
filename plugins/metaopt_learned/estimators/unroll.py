"""Backpropagation through unrolls, whole or truncated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import GradientEstimator, as_worst, mean_of_live, own_copies, window_metrics
from metaopt.meta.inner import InnerProblem
from metaopt.meta.shard import ALONE, Shard
from metaopt.space import hyper, option
from metaopt_learned.estimators.episodes import first_carry, next_carry, plan_episodes, plan_window
from metaopt_learned.estimators.objectives import OBJECTIVES, loss_weights
from metaopt_learned.estimators.reverse import unroll_gradient


class _Backpropagation(GradientEstimator):
    """N runs whose losses are differentiated step by step; see `reverse`."""

    copies: int = option(16, low=1, doc="runs N")
    segment: int = option(1, low=1, doc="inner steps whose graph is kept at a time; 1 needs the least memory")
    clip_task: float = hyper(0.0, 0.0, doc="largest norm of one run's gradient; biased unless 0 = never")

    def _finish(
        self, inner: InnerProblem, losses: Tensor, gradients: Tensor, shard: Shard, steps: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Mean gradient [D], which of its own runs go on [n], and metrics; losses [n] and gradients [n, D]."""
        exact = torch.isfinite(gradients).all(1).to(losses.device)
        live = exact & torch.isfinite(as_worst(losses, inner.worst))
        gradient, count = mean_of_live(gradients, live.to(gradients.device), self.clip_task, shard)
        metrics = window_metrics(shard.gather(losses, self.copies), count, int(shard.sum(steps)), inner.worst)
        return gradient, exact & torch.isfinite(losses), metrics


class FullUnroll(_Backpropagation):
    r"""The exact gradient of whole episodes: :math:`g = \frac{1}{N} \sum_i \nabla_\theta L(s_1, \ldots, s_{T_i})`.

    L is the mean, the lowest or the last loss of an episode. Unbiased, without variance besides that of the runs; long
    chaotic runs have gradients of any size (Metz et al., 2021, https://arxiv.org/abs/2111.05803).
    """

    objective: str = option("mean", choices=OBJECTIVES, doc="of the losses of an episode")

    def start(self, inner: InnerProblem, theta: Theta, seed: int, shard: Shard = ALONE) -> dict[str, Any]:
        """Nothing goes on from one estimate to the next."""
        own_copies(self.copies, "copies", shard)
        return {"seed": torch.tensor(seed), "windows": torch.tensor(0), "copies": {}}

    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any], shard: Shard = ALONE
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """One episode of every copy."""
        own = own_copies(self.copies, "copies", shard)
        stretches, lengths = plan_episodes(inner, carry, own, self.segment)
        thetas = to_vector(theta).expand(len(own), 1, -1)
        losses, gradients, _ = unroll_gradient(
            inner, thetas, theta, {}, stretches, lambda found: loss_weights(found, lengths, self.objective)
        )
        values = (loss_weights(losses, lengths, self.objective) * losses).sum(2)
        gradient, _, metrics = self._finish(inner, values[:, 0], gradients[:, 0], shard, lengths.sum())
        return from_vector(gradient, theta), {**carry, "windows": carry["windows"] + 1}, metrics


class TruncatedUnroll(_Backpropagation):
    r"""Backpropagation through windows of K steps: :math:`g = \frac{1}{N} \sum_i \nabla_\theta \frac{1}{K} \sum_t L_{i,t}`.

    The state at a window's start is taken as constant, so what theta did before is ignored: biased towards short horizons.
    """

    window: int = option(20, low=1, doc="inner steps K per meta-gradient")
    stagger: bool = option(True, choices=(False, True), doc="cut first episodes, so that runs stay out of phase")

    @torch.no_grad()
    def start(self, inner: InnerProblem, theta: Theta, seed: int, shard: Shard = ALONE) -> dict[str, Any]:
        """N runs that begin their first episode with the first window."""
        return first_carry(inner, theta, seed, len(own_copies(self.copies, "copies", shard)), 1, {})

    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any], shard: Shard = ALONE
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """One window of every copy."""
        own = own_copies(self.copies, "copies", shard)
        stretches, clock = plan_window(inner, carry, self.window, own, self.copies if self.stagger else 0)
        pieces = [piece for stretch in stretches for piece in stretch.pieces(self.segment)]
        losses, gradients, state = unroll_gradient(
            inner, to_vector(theta).expand(len(own), 1, -1), theta, carry["copies"]["state"], pieces,
            lambda found: torch.full_like(found, 1 / self.window),
        )  # fmt: skip
        steps = torch.tensor(len(own) * self.window)
        gradient, survives, metrics = self._finish(inner, losses.mean(2)[:, 0], gradients[:, 0], shard, steps)
        return from_vector(gradient, theta), next_carry(carry, clock, survives, state, {}), metrics
