"""Evolution strategies on truncated windows: `TruncatedES`, and `PES`, which is unbiased."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import GradientEstimator, episode_seeds, normal_noise
from metaopt.meta.inner import InnerProblem, write_copies
from metaopt.space import hyper, option


class _Antithetic(GradientEstimator):
    """What ES and PES share: N pairs theta +- eps that run in windows, each pair with its own clock.

    Episodes end inside windows and start again at once, without a gap; with ``stagger`` the first episodes are
    shortened evenly so that the pairs stay out of phase.
    """

    pairs: int = option(16, low=1, doc="antithetic pairs N")
    window: int = option(20, low=1, doc="inner steps K per meta-gradient")
    sigma: float = hyper(0.01, 0.0, open_low=True, scale="log", search=(1e-3, 0.1), doc="standard deviation of eps")
    stagger: bool = option(True, choices=(False, True), doc="start the pairs out of phase")

    def _clock(self, inner: InnerProblem, seed: int) -> dict[str, Tensor]:
        """Steps left of each pair's episode, how many episodes it has begun, and the seed."""
        n, horizon = self.pairs, inner.horizon
        left = torch.full((n,), horizon)
        if self.stagger:
            left = 1 + (torch.arange(n) * horizon) // n
        return {"left": left, "episode": torch.zeros(n, dtype=torch.int64), "seed": torch.tensor(seed)}

    def _seeds(self, clock: dict[str, Tensor], which: Tensor) -> Tensor:
        return episode_seeds(int(clock["seed"]), which, clock["episode"][which])

    def _run_window(
        self,
        inner: InnerProblem,
        theta: Theta,
        thetas: Theta,
        state: dict[str, Any],
        clock: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Tensor]]:
        """K steps of both signs of N pairs (2 N copies), restarting pairs whose episode ends.

        Returns losses [2, N, K]; ``fresh`` bool [N, K + 1], whether an episode has ended in this window before
        that step (the last column: by the window's end); and the new state and clock.
        """
        n, done = self.pairs, 0
        clock = dict(clock)
        losses = []
        fresh = torch.zeros(n, self.window + 1, dtype=torch.bool)
        while done < self.window:
            steps = min(int(clock["left"].min()), self.window - done)
            segment, state = inner.run(thetas, state, steps)
            losses.append(segment.reshape(2, n, steps))
            done += steps
            clock["left"] = clock["left"] - steps
            ended = clock["left"] == 0
            if ended.any():
                which = ended.nonzero().squeeze(1)
                fresh[which, done:] = True
                clock["episode"] = clock["episode"] + ended
                clock["left"] = torch.where(ended, inner.horizon, clock["left"])
                begun = inner.start(theta, self._seeds(clock, which))
                for at in (which, which + n):
                    state = write_copies(state, at.to(segment.device), begun)
        return torch.cat(losses, dim=2), fresh, state, clock


class TruncatedES(_Antithetic):
    r"""Antithetic evolution strategies on windows of K steps.

    .. math:: g = \frac{1}{N} \sum_i \frac{L(\theta + \epsilon_i) - L(\theta - \epsilon_i)}{2 \sigma^2} \epsilon_i,
        \qquad \epsilon_i \sim N(0, \sigma^2 I)

    L is the mean loss of the window; both signs start from one state, and the + run carries on. Ignores what theta did
    before the window: biased towards short horizons, but of low variance.
    Metz et al., 2019 (https://arxiv.org/abs/1810.10180).
    """

    def start(self, inner: InnerProblem, theta: Theta, seed: int) -> dict[str, Any]:
        """N fresh runs."""
        clock = self._clock(inner, seed)
        state = inner.start(theta, self._seeds(clock, torch.arange(self.pairs)))
        return {"clock": clock, "state": state, "windows": torch.tensor(0)}

    @torch.no_grad()
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any]
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """See the class."""
        n, center = self.pairs, to_vector(theta)
        eps = self.sigma * normal_noise(int(carry["clock"]["seed"]), int(carry["windows"]), (n, len(center)), center)
        thetas = from_vector(torch.cat([center + eps, center - eps]), theta)
        both = tree.map_tree(lambda leaf: torch.cat([leaf, leaf]), carry["state"])
        losses, _, both, clock = self._run_window(inner, theta, thetas, both, carry["clock"])
        delta, dropped = _difference(losses)
        gradient = (delta.mean(1).to(center) @ eps) / (2 * self.sigma**2 * max(n - dropped, 1))
        state = tree.index(both, slice(0, n))
        return (
            from_vector(gradient, theta),
            {"clock": clock, "state": state, "windows": carry["windows"] + 1},
            _metrics(losses, dropped),
        )


class PES(_Antithetic):
    r"""Persistent evolution strategies: unbiased for the whole episode although windows are short.

    Each pair keeps two runs and the sum :math:`\xi_i` of all perturbations since its episode began:

    .. math:: g = \frac{1}{N} \sum_i \frac{1}{2 \sigma^2 K} \sum_{t} (L^+_{i,t} - L^-_{i,t})\, \xi_{i,t}

    where :math:`\xi_{i,t}` includes this window's perturbation, and restarts with it after an episode's last step; that
    last step itself still belongs to the old episode. Vicol, Metz and Sohl-Dickstein, 2021
    (https://arxiv.org/abs/2112.13835).
    """

    def start(self, inner: InnerProblem, theta: Theta, seed: int) -> dict[str, Any]:
        """N pairs of fresh runs, alike in all but the perturbations to come."""
        clock = self._clock(inner, seed)
        state = inner.start(theta, self._seeds(clock, torch.arange(self.pairs)))
        center = to_vector(theta)
        return {
            "clock": clock,
            "state": tree.map_tree(lambda leaf: torch.cat([leaf, leaf]), state),
            "accumulator": center.new_zeros(self.pairs, len(center)),
            "windows": torch.tensor(0),
        }

    @torch.no_grad()
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any]
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """See the class."""
        center = to_vector(theta)
        shape = (self.pairs, len(center))
        eps = self.sigma * normal_noise(int(carry["clock"]["seed"]), int(carry["windows"]), shape, center)
        thetas = from_vector(torch.cat([center + eps, center - eps]), theta)
        losses, fresh, state, clock = self._run_window(inner, theta, thetas, carry["state"], carry["clock"])
        fresh = fresh.to(losses.device)
        delta, dropped = _difference(losses)
        live = torch.ones_like(fresh[:, :-1])
        gradient = pes_gradient(delta, live, fresh[:, :-1], carry["accumulator"], eps, self.sigma)
        gradient = gradient * (self.pairs / max(self.pairs - dropped, 1))
        # after an episode's end the pair has only seen this window's eps; ended at the very end: nothing yet
        ended_last = (clock["left"] == inner.horizon).to(fresh.device) & fresh[:, -1]
        accumulator = torch.where(fresh[:, -1:], eps, carry["accumulator"] + eps)
        accumulator = torch.where(ended_last.unsqueeze(1), torch.zeros_like(eps), accumulator)
        new_carry = {"clock": clock, "state": state, "accumulator": accumulator, "windows": carry["windows"] + 1}
        return from_vector(gradient, theta), new_carry, _metrics(losses, dropped)


def pes_gradient(delta: Tensor, live: Tensor, fresh: Tensor, accumulator: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """The PES estimate of one window.

    Args:
        delta: L+ - L- per pair and step [N, K].
        live: bool [N, K]; steps that count (pairs without any contribute 0).
        fresh: bool [N, K]; whether an episode ended *before* this step in this window. The step that ends an episode
            is not fresh: crediting it to the new perturbation alone makes PES as biased as truncated ES.
        accumulator: [N, D], sum of the perturbations of earlier windows since the episode began.
        eps: [N, D], this window's perturbations.
        sigma: their standard deviation.

    Returns:
        [D], an unbiased estimate of the gradient of the mean loss per live step (of the Gaussian-smoothed problem).
    """
    counts = live.sum(1).clamp(min=1)
    old = (delta * (live & ~fresh)).sum(1) / counts
    new = (delta * (live & fresh)).sum(1) / counts
    credit = old.unsqueeze(1).to(eps) * (accumulator + eps) + new.unsqueeze(1).to(eps) * eps
    return credit.mean(0) / (2 * sigma**2)


def _difference(losses: Tensor) -> tuple[Tensor, int]:
    """L+ - L- [N, K], zero for the pairs of which a loss is not finite, and how many these are."""
    delta = losses[0] - losses[1]
    finite = torch.isfinite(delta).all(1)
    return torch.where(finite.unsqueeze(1), delta, torch.zeros_like(delta)), int((~finite).sum())


def _metrics(losses: Tensor, dropped: int) -> dict[str, float]:
    finite = losses[torch.isfinite(losses)]
    return {"meta_loss": float(finite.mean()) if finite.numel() else float("nan"), "dropped_pairs": float(dropped)}
