"""The contract of a meta-gradient estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from metaopt.learned import Theta
from metaopt.meta.inner import InnerProblem
from metaopt.random import hash64
from metaopt.rule import Declared


class GradientEstimator(Declared, ABC):
    """Estimates d(mean inner loss) / d(theta), one window at a time.

    The carry between windows is a nested dict of tensors: it is checkpointed with theta, and a resumed run goes on
    bit for bit. All randomness is a pure function of (seed, window number, copy).
    """

    @abstractmethod
    def start(self, inner: InnerProblem, theta: Theta, seed: int) -> dict[str, Any]:
        """The carry before the first window."""

    @abstractmethod
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any]
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """One window: the meta-gradient (like theta), the new carry, and metrics such as ``meta_loss``."""


def normal_noise(seed: int, window: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal numbers, a pure function of (seed, window), in ``like``'s dtype and device."""
    key = int(hash64(hash64(torch.tensor(seed)) + window))
    generator = torch.Generator().manual_seed(key)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def episode_seeds(seed: int, copies: Tensor, episode: Tensor) -> Tensor:
    """One seed per (copy, episode) [N]."""
    return hash64(hash64(hash64(torch.tensor(seed)) + copies) + episode)
