"""Forward-mode gradients along random directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaopt import tree
from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import GradientEstimator, as_worst, mean_of_live, own_copies, window_metrics
from metaopt.meta.inner import InnerProblem
from metaopt.meta.shard import ALONE, Shard
from metaopt.space import hyper, option
from metaopt_learned.estimators.episodes import (
    episode_noise,
    first_carry,
    next_carry,
    plan_window,
    portions,
    run_stretch,
)
from metaopt_learned.estimators.windowed import credited


class ForwardGradient(GradientEstimator):
    r"""Directional derivatives times their directions, the derivative of the state carried through the episode.

    .. math:: g = \frac{1}{N} \sum_i \frac{1}{K} \sum_t \left(\frac{d L_{i,t}}{d\theta} \cdot v_i\right) v_i, \qquad
        v_i \sim N(0, I)

    The total derivative along v goes forward with the run (one tangent beside each state) and from window to window; each
    run keeps its direction for an episode. Unbiased for the loss itself, without smoothing; the variance grows with the
    size of theta. Baydin et al., 2022 (https://arxiv.org/abs/2202.08587); carried between windows as in Silver et al., 2021
    (DODGE, https://openreview.net/forum?id=5i7lJLuhTm).
    """

    copies: int = option(16, low=1, doc="runs N, each with a direction")
    window: int = option(20, low=1, doc="inner steps K per meta-gradient")
    stagger: bool = option(True, choices=(False, True), doc="cut first episodes, so that runs stay out of phase")
    clip_task: float = hyper(0.0, 0.0, doc="largest norm of one run's contribution; biased unless 0 = never")

    @torch.no_grad()
    def start(self, inner: InnerProblem, theta: Theta, seed: int, shard: Shard = ALONE) -> dict[str, Any]:
        """N runs that begin their first episode with the first window."""
        carry = first_carry(inner, theta, seed, len(own_copies(self.copies, "copies", shard)), 1, {})
        # of integers there is no derivative; they keep their place in the tree
        carry["copies"]["tangent"] = tree.map_tree(torch.zeros_like, carry["copies"]["state"])
        return carry

    # grad mode stays on: only then does an unroll run in a form that can be differentiated, forward too
    @torch.enable_grad()
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any], shard: Shard = ALONE
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """One window of every copy."""
        own, center = own_copies(self.copies, "copies", shard), to_vector(theta).detach()
        stretches, clock = plan_window(inner, carry, self.window, own, self.copies if self.stagger else 0)
        directions = episode_noise(int(carry["seed"]), stretches, own, len(center), center)
        every, parts = torch.arange(len(own)), []
        with forward_ad.dual_level():
            state = tree.map_tree(_dual, carry["copies"]["state"], carry["copies"]["tangent"])
            for stretch in stretches:
                v = directions[stretch.begun - stretches[0].begun, every]
                thetas = forward_ad.make_dual(center.expand_as(v).contiguous(), v).unsqueeze(1)
                part, state = run_stretch(inner, thetas, theta, state, stretch)
                parts.append(part)
            losses, slopes = (both[:, 0] for both in _unpack(torch.cat(parts, 2)))
            tangent = tree.map_tree(lambda leaf: _unpack(leaf)[1], state)
            state = tree.map_tree(lambda leaf: _unpack(leaf)[0], state)
        contributions = credited(slopes.to(center), portions(stretches), list(directions))
        exact = torch.isfinite(slopes).all(1)
        live = exact & torch.isfinite(as_worst(losses, inner.worst)).all(1)
        survives = exact & torch.isfinite(losses).all(1)
        gradient, count = mean_of_live(contributions, live.to(center.device), self.clip_task, shard)
        everyone = shard.gather(losses, self.copies)
        metrics = window_metrics(everyone, count, everyone.numel(), inner.worst)
        new_carry = next_carry(carry, clock, survives, state, {"tangent": tangent})
        return from_vector(gradient, theta), new_carry, metrics


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(value, tangent) if value.is_floating_point() else value


def _unpack(value: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent, which is 0 where nothing depends on theta."""
    if not value.is_floating_point():
        return value, torch.zeros_like(value)
    both = forward_ad.unpack_dual(value)
    return both.primal, torch.zeros_like(both.primal) if both.tangent is None else both.tangent
