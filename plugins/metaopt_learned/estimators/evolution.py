"""What all evolution strategies share: perturbations, differences of losses, and their options."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from metaopt.learned import Theta, to_vector
from metaopt.meta.estimator import GradientEstimator, copy_noise
from metaopt.meta.shard import ALONE, Shard
from metaopt.space import hyper, option


class EvolutionStrategy(GradientEstimator):
    r"""N perturbations :math:`\epsilon_i \sim N(0, \sigma^2 S^2)` of theta, with S the diagonal of ``sigma_scale``.

    All strategies are of the form :math:`g = \frac{1}{N} \sum_i \Delta_i\, \sigma^{-2} S^{-2} \epsilon_i`. Antithetic:
    :math:`\Delta_i = \frac{1}{2} (L(\theta + \epsilon_i) - L(\theta - \epsilon_i))`. One-sided:
    :math:`\Delta_i = L(\theta + \epsilon_i) - \frac{1}{N - 1} \sum_{j \ne i} L(\theta + \epsilon_j)`; the others' mean is
    independent of :math:`\epsilon_i`, whose mean is 0, so it changes the variance and not the expectation. Both estimate
    the gradient of the same smoothed objective. One-sided estimates cost half as much and have far higher variance,
    unless the pairs share a task (``pairs_per_task``): then the others are those of the same task.

    Shaping forgets the size of losses, and so makes a strategy biased: ``sign`` keeps that of the difference (VeLO, Metz et
    al. 2022); ``rank`` replaces losses by their centred ranks among those of all pairs (Salimans et al., 2017).

    Of several processes each sums the contributions of its own pairs, and all-reduces them. With ``seed_replay`` each sums
    those of all pairs, whose perturbations it draws again from their seeds; then nothing of theta's size is exchanged,
    which pays for a small theta or slow links (Salimans et al., 2017, https://arxiv.org/abs/1703.03864, section 2.1).
    """

    pairs: int = option(16, low=1, doc="antithetic pairs N (single perturbations where one-sided)")
    pairs_per_task: int = option(1, low=1, doc="pairs that share initial parameters and data; divides pairs")
    sigma: float = hyper(0.01, 0.0, open_low=True, scale="log", search=(1e-3, 0.1), doc="standard deviation of eps")
    sigma_scale: tuple[tuple[str, float], ...] = option((), doc="(pattern of theta's names, factor on sigma) pairs")
    antithetic: bool = option(True, choices=(False, True), doc="both signs of each perturbation")
    shaping: str = option("none", choices=("none", "rank", "sign"), doc="what replaces the losses; biased unless none")
    clip_task: float = hyper(0.0, 0.0, doc="largest norm of one pair's contribution; biased unless 0 = never")
    seed_replay: bool = option(False, choices=(False, True), doc="processes exchange losses instead of gradients")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.sigma_scale.items() if isinstance(self.sigma_scale, Mapping) else self.sigma_scale
        scales = tuple((str(pattern), float(factor)) for pattern, factor in given)
        for pattern, factor in scales:
            if not 0 < factor < float("inf"):
                raise ValueError(
                    f"sigma_scale of {pattern!r} must be above 0 and finite, got {factor}; 1 changes nothing"
                )
        object.__setattr__(self, "sigma_scale", scales)
        if self.pairs % self.pairs_per_task:
            raise ValueError(
                f"pairs must be a multiple of pairs_per_task {self.pairs_per_task}, got {self.pairs}; "
                f"{-(-self.pairs // self.pairs_per_task) * self.pairs_per_task} is one"
            )
        if not self.antithetic and self._group_size < 2:
            raise ValueError("antithetic=False needs a second pair to compare with, got pairs=1; raise pairs")

    @property
    def _signs(self) -> int:
        return 2 if self.antithetic else 1

    @property
    def _group_size(self) -> int:
        """Pairs that one-sided losses are compared within."""
        return self.pairs_per_task if self.pairs_per_task > 1 else self.pairs

    def _share_of_sum(self, own: Tensor, shard: Shard) -> tuple[Tensor, slice, Shard]:
        """Pairs whose contributions this process sums, which of these are its own, and the processes that sum the rest."""
        if self.seed_replay:
            return torch.arange(self.pairs), slice(int(own[0]), int(own[-1]) + 1), ALONE
        return own, slice(None), shard

    def _deviations(self, theta: Theta) -> Tensor:
        """The standard deviation of each entry of eps [D]."""
        for pattern, _ in self.sigma_scale:
            if not any(fnmatchcase(name, pattern) for name in theta):
                raise ValueError(f"sigma_scale names {pattern!r}, but theta has only {', '.join(theta)}")
        return to_vector(
            {name: torch.full_like(value, self.sigma * self._factor(name)) for name, value in theta.items()}
        )

    def _factor(self, name: str) -> float:
        return next((factor for pattern, factor in self.sigma_scale if fnmatchcase(name, pattern)), 1.0)

    def _noise(self, seed: int, window: int | Tensor, own: Tensor, deviations: Tensor) -> Tensor:
        """eps [n, D]."""
        return deviations * copy_noise(seed, window, own, len(deviations), deviations)

    def _perturbed(self, center: Tensor, eps: Tensor) -> Tensor:
        """theta +- eps [n, S, D], the plus sign first."""
        signs = torch.tensor([1.0, -1.0][: self._signs]).to(center)
        return center + signs[:, None] * eps.unsqueeze(1)

    def _comparable(self, live: Tensor) -> Tensor:
        """Which pairs [N] have an estimate: the live ones, one-sided where another of the group is live."""
        if self.antithetic:
            return live
        grouped = live.unflatten(0, (-1, self._group_size))
        return (grouped & (grouped.sum(1, keepdim=True) > 1)).flatten()

    def _differences(self, losses: Tensor, live: Tensor) -> Tensor:
        """Delta of each pair and step [N, K] from all pairs' losses [N, S, K]; 0 where not `_comparable`."""
        losses = torch.where(live[:, None, None], losses, torch.zeros_like(losses))
        if self.shaping == "rank":
            losses = _centred_ranks(losses.mean(2), live).unsqueeze(2).expand_as(losses)
        if self.antithetic:
            delta = (losses[:, 0] - losses[:, 1]) / 2
        else:
            grouped = losses[:, 0].unflatten(0, (-1, self._group_size))
            counts = live.unflatten(0, (-1, self._group_size)).sum(1)[:, None, None].to(grouped)
            others = (grouped.sum(1, keepdim=True) - grouped) / (counts - 1).clamp(min=1)
            delta = (grouped - others).flatten(0, 1)
        if self.shaping == "sign":
            delta = delta.mean(1, keepdim=True).sign().expand_as(delta) / self._signs
        return torch.where(self._comparable(live).unsqueeze(1), delta, torch.zeros_like(delta))


def _centred_ranks(losses: Tensor, live: Tensor) -> Tensor:
    """Ranks of all signs of the live pairs [N, S], spread evenly over [-1/2, 1/2]; 0 elsewhere."""
    _, place, counts = losses[live].unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts + 1) / 2  # equal losses share the mean of their ranks, which count from 0
    centred = torch.zeros_like(losses)
    centred[live] = ranks.to(losses)[place] / max(place.numel() - 1, 1) - 0.5
    return centred
