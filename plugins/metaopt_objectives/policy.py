"""Surrogates of policy gradients, r = pi(a|s) / pi_old(a|s) and A the advantage: mirror learning.

    loss = -(r A - D),    D >= 0,    D = 0 and dD/dr = 0 at r = 1

are the conditions under which a drift D keeps the guarantees of a trust region (Kuba et al. 2022, arXiv:2201.02373). Here they
hold by construction: a `Drift` gives D as what is above 0 of something that at r = 1 is 0 with slope 0, or below 0. Ratios
below 1e-8 count as that in logarithms.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from metaopt.objective import INPUTS, Kind, Objective
from metaopt.space import hyper


class Drift(Objective):
    """-(r A - max(0, drift)): write `drift`."""

    kind: ClassVar[Kind] = "rl"
    inputs: ClassVar[tuple[str, ...]] = INPUTS["rl"]

    def loss(self, ratio: Any, advantage: Any, **hp: Any) -> Any:
        """The surrogate with its drift."""
        return torch.relu(self.drift(ratio, advantage, **hp)) - ratio * advantage

    @abstractmethod
    def drift(self, ratio: Any, advantage: Any, *args: Any, **hp: Any) -> Any:
        """What, above 0, is the drift; at r = 1 at most 0, or 0 with slope 0."""


def _log(ratio: Any) -> Any:
    return torch.log(torch.clamp(ratio, min=1e-8))


class ImportanceSampling(Drift):
    """-r A: the plain policy gradient, with no drift (Kakade and Langford 2002, ICML)."""

    def drift(self, ratio: Any, advantage: Any) -> Any:
        return 0.0 * ratio


class PPOClip(Drift):
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    As a drift: D = max(0, (r - clip(r)) A).
    """

    epsilon: float = hyper(0.2, 0.0, 1.0, open_low=True, search=(0.05, 0.5), doc="how far the ratio may go from 1")

    def drift(self, ratio: Any, advantage: Any, epsilon: Any) -> Any:
        return (ratio - torch.clamp(ratio, min=1 - epsilon, max=1 + epsilon)) * advantage


class PPOPenalty(Drift):
    """-r A + beta (r - 1 - log r): a KL penalty per sample (Schulman et al. 2017, arXiv:1707.06347, eq. 8)."""

    beta: float = hyper(1.0, 0.0, 1000.0, scale="log", search=(0.01, 10.0), doc="weight of the divergence")

    def drift(self, ratio: Any, advantage: Any, beta: Any) -> Any:
        return beta * (ratio - 1 - _log(ratio))


class DiscoveredPolicy(Drift):
    """D = max(0, (r - 1) A - alpha tanh((r - 1) A / alpha)) where A >= 0, else max(0, A log r - beta tanh(A log r / beta)):
    discovered policy optimisation, the closed form of what LPO learned (Lu et al. 2022, arXiv:2210.05639).
    """

    alpha: float = hyper(2.0, 0.0, 100.0, scale="log", open_low=True, search=(0.1, 10.0), doc="of positive advantages")
    beta: float = hyper(0.6, 0.0, 100.0, scale="log", open_low=True, search=(0.1, 10.0), doc="of negative advantages")

    def drift(self, ratio: Any, advantage: Any, alpha: Any, beta: Any) -> Any:
        linear, logarithmic = (ratio - 1) * advantage, _log(ratio) * advantage
        return torch.where(
            advantage >= 0,
            linear - alpha * torch.tanh(linear / alpha),
            logarithmic - beta * torch.tanh(logarithmic / beta),
        )


class LearnedDrift(Drift, eq=False):
    """D = max(0, f(x) - 1e-4): learned policy optimisation (Lu et al. 2022, arXiv:2210.05639).

    f is a network without biases, last tanh(first x), of x = u, u^2, u A, u^2 A, v, v^2, v A, v^2 A with u = 1 - r, v = log r.
    So f(x) is 0 at r = 1.

    Attributes:
        first: [H, 8].
        last: [H].
    """

    first: Tensor
    last: Tensor

    def drift(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        u, v = 1 - ratio, _log(ratio)
        columns = [f * a for f in (u, u * u, v, v * v) for a in (torch.ones_like(advantage), advantage)]
        x = torch.stack(columns, -1)
        return torch.tanh(x @ self.first.to(x).T) @ self.last.to(x) - 1e-4


def learned_drift(hidden: int = 128, seed: int = 0) -> LearnedDrift:
    """A `LearnedDrift` with random weights: LeCun normal ones of ``hidden`` units.

    Raises:
        ValueError: no unit.
    """
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden}")
    generator = Generator().manual_seed(seed)
    return LearnedDrift(
        torch.randn(hidden, 8, generator=generator) / 8**0.5, torch.randn(hidden, generator=generator) / hidden**0.5
    )
