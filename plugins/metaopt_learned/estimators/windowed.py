"""Evolution strategies on windows: what truncated ES, PES and NRES share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt import tree
from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import as_worst, mean_of_live, own_copies, window_metrics
from metaopt.meta.inner import InnerProblem
from metaopt.meta.shard import ALONE, Shard
from metaopt.space import option
from metaopt_learned.estimators.episodes import Stretch, first_carry, next_carry, plan_window, portions, run_stretch
from metaopt_learned.estimators.evolution import EvolutionStrategy


class WindowedStrategy(EvolutionStrategy):
    r"""Pairs that run in windows of K steps, each with its own clock.

    Episodes end inside windows and others begin at once, without a gap. A window's estimate is

    .. math:: g = \frac{1}{N} \sum_i \frac{1}{K} \sum_t \Delta_{i,t}\, \sigma^{-2} S^{-2} c_{i,t}

    where the strategies differ in the credit :math:`c_{i,t}`: the perturbations that the loss at step t is blamed on.
    """

    window: int = option(20, low=1, doc="inner steps K per meta-gradient")
    stagger: bool = option(True, choices=(False, True), doc="cut first episodes, so that pairs stay out of phase")

    @torch.no_grad()
    def start(self, inner: InnerProblem, theta: Theta, seed: int, shard: Shard = ALONE) -> dict[str, Any]:
        """N pairs that begin their first episode with the first window."""
        own = own_copies(self.pairs, "pairs", shard)
        self._deviations(theta)  # refuses names that theta lacks
        if self.seed_replay:
            memory = self._memory(self.pairs, to_vector(theta))
            return first_carry(inner, theta, seed, len(own), self._kept_signs, {}) | memory
        return first_carry(inner, theta, seed, len(own), self._kept_signs, self._memory(len(own), to_vector(theta)))

    @torch.no_grad()
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any], shard: Shard = ALONE
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """See the class."""
        own, center, deviations = own_copies(self.pairs, "pairs", shard), to_vector(theta), self._deviations(theta)
        summed, rows, summing = self._share_of_sum(own, shard)
        streams = own // self.pairs_per_task
        stagger = self.pairs // self.pairs_per_task if self.stagger else 0
        stretches, clock = plan_window(inner, carry, self.window, streams, stagger)
        plan, memory = stretches, carry["copies"]
        if self.seed_replay:
            clocks = shard.gather({name: carry["copies"][name] for name in clock}, self.pairs)
            every = {**carry, "copies": clocks}
            plan, _ = plan_window(inner, every, self.window, summed // self.pairs_per_task, stagger)
            memory = carry
        eps = self._window_noise(carry, plan, summed, deviations)
        state = tree.map_tree(lambda leaf: leaf.expand(-1, self._signs, *leaf.shape[2:]), carry["copies"]["state"])
        own_losses, state, analytic = self._run(inner, theta, eps[:, rows], state, stretches)
        found = shard.gather(own_losses, self.pairs)
        losses, sound = as_worst(found, inner.worst), torch.isfinite(found).all(2).all(1)
        live = torch.isfinite(losses).all(2).all(1)
        at = summed.to(center.device)
        delta = self._differences(losses, live).to(center)[at]
        credits, memory = self._credits(memory, plan, eps)
        contributions = analytic + credited(delta, portions(plan), credits) / deviations**2
        counted = self._comparable(live).to(center.device)[at]
        gradient, count = mean_of_live(contributions, counted, self.clip_task, summing)
        # those that share a task with a diverged pair begin anew with it, so that they go on sharing
        survives = sound.unflatten(0, (-1, self.pairs_per_task)).all(1).cpu()[streams]
        kept = tree.map_tree(lambda leaf: leaf[:, : self._kept_signs].clone(), state)
        metrics = window_metrics(found, count, self._sweeps * losses.numel(), inner.worst)
        if self.seed_replay:
            new_carry = next_carry(carry, clock, survives, kept, {}) | memory
        else:
            new_carry = next_carry(carry, clock, survives, kept, memory)
        return from_vector(gradient, theta), new_carry, metrics

    _sweeps: ClassVar[int] = 1  # runs of each window and sign

    @property
    def _kept_signs(self) -> int:
        """Runs per pair that go on into the next window."""
        return self._signs

    def _memory(self, n: int, center: Tensor) -> dict[str, Tensor]:
        """What the strategy remembers of each pair besides its runs, before the first window."""
        return {}

    def _window_noise(self, carry: dict[str, Any], stretches: list[Stretch], own: Tensor, deviations: Tensor) -> Tensor:
        """eps [P, n, D] for each of the P portions of the window; here one for all."""
        eps = self._noise(int(carry["seed"]), int(carry["windows"]), own, deviations)
        return eps.expand(1 + int(portions(stretches).max()), *eps.shape)

    def _run(
        self, inner: InnerProblem, theta: Theta, eps: Tensor, state: dict[str, Any], stretches: list[Stretch]
    ) -> tuple[Tensor, dict[str, Any], Tensor]:
        """Losses [n, S, K] of the perturbed runs, their new state, and what is added to the contributions: nothing."""
        center, every = to_vector(theta), torch.arange(eps.shape[1], device=eps.device)
        parts = []
        for stretch in stretches:
            portion = (stretch.begun - stretches[0].begun).to(eps.device)
            part, state = run_stretch(inner, self._perturbed(center, eps[portion, every]), theta, state, stretch)
            parts.append(part)
        return torch.cat(parts, 2), state, center.new_zeros(())

    def _credits(
        self, memory: dict[str, Any], stretches: list[Stretch], eps: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """c [n, D] of each portion, and the new memory; here the perturbations of the portion itself, and none."""
        return list(eps), {}


def credited(delta: Tensor, portion: Tensor, credits: list[Tensor]) -> Tensor:
    """Mean over steps of the difference times its credit [n, D].

    Args:
        delta: of each pair and step [n, K].
        portion: which of the credits a step gets, int64 [n, K]. The step that ends an episode is still of its portion:
            crediting it to the next makes PES as biased as truncated ES.
        credits: [n, D] each.
    """
    portion, total = portion.to(delta.device), torch.zeros_like(credits[0])
    for number, credit in enumerate(credits):  # scatter_add would sum in any order on a GPU
        total = total + delta.where(portion == number, 0).sum(1, keepdim=True) * credit
    return total / delta.shape[1]
