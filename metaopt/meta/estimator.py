"""The contract of a meta-gradient estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from metaopt.learned import Theta
from metaopt.meta.inner import InnerProblem
from metaopt.meta.shard import ALONE, Shard
from metaopt.random import hash64
from metaopt.rule import Declared


class GradientEstimator(Declared, ABC):
    """Estimates d(mean inner loss) / d(theta), one window at a time.

    The carry between windows is a nested dict of tensors, ``{"seed": 0-d, "windows": 0-d, "copies": {...}}``: below
    "copies" every leaf has one row per copy of this process (a copy of an antithetic estimator is a pair), so that
    checkpoints do not depend on the number of processes. All randomness is a pure function of (seed, window number, copy).

    A copy whose loss was not finite in a window is counted, left out of the mean, and starts a new episode with the next.
    One whose losses are finite and whose contribution is not (an overflow) is counted and left out alike. Where the inner
    problem has a worst loss, a loss that is not finite counts as that one; its copy stays in the mean, is counted as
    ``worst`` instead, and starts a new episode all the same.
    """

    @abstractmethod
    def start(self, inner: InnerProblem, theta: Theta, seed: int, shard: Shard = ALONE) -> dict[str, Any]:
        """The carry before the first window."""

    @abstractmethod
    def estimate(
        self, inner: InnerProblem, theta: Theta, carry: dict[str, Any], shard: Shard = ALONE
    ) -> tuple[Theta, dict[str, Any], dict[str, float]]:
        """One window: the meta-gradient (like theta), the new carry, and metrics.

        The gradient is the mean over the copies of all processes. Metrics hold at least ``meta_loss`` (mean finite loss
        at theta), ``diverged`` (copies left out), ``worst`` (copies with losses that count as the worst) and ``inner_steps``
        (steps run, both signs counted), over all processes.
        """


def own_copies(n: int, what: str, shard: Shard) -> Tensor:
    """Numbers of this process's share of n copies, int64.

    Raises:
        ValueError: there are more processes than copies; ``what`` is the name of the option that counts them.
    """
    if n < shard.world:
        raise ValueError(
            f"{what} must be at least the number of processes {shard.world}, got {n}; start fewer processes"
        )
    return shard.own(n)


def copy_noise(seed: int, window: int | Tensor, copies: Tensor, size: int, like: Tensor) -> Tensor:
    """Standard normal numbers [len(copies), size], row by row a pure function of (seed, window, copy), like ``like``.

    ``window`` is one number, or one per copy.
    """
    keys = hash64(hash64(hash64(torch.tensor(seed)) + window) + copies)
    noise, generator = torch.empty(len(keys), size, dtype=torch.float64), torch.Generator()
    for row, key in zip(noise, keys.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(key))
    return noise.to(like)


def episode_seeds(seed: int, copies: Tensor, episode: int | Tensor) -> Tensor:
    """One seed per (copy, episode) [N]."""
    return hash64(hash64(hash64(torch.tensor(seed)) + copies) + episode)


def mean_of_live(contributions: Tensor, live: Tensor, clip: float, shard: Shard) -> tuple[Tensor, int]:
    """The meta-gradient [D], and how many copies it is the mean of: those of all processes that are live and whose
    contribution is finite; 0 where there is none.

    Args:
        contributions: [n, D], of this process's copies; anything in the rows of those that are not live.
        live: bool [n].
        clip: a row is scaled down to this norm, which biases the mean towards the many and small; 0 = never.
        shard: of this process.
    """
    sound = live & torch.isfinite(contributions).all(1)
    rows = torch.where(sound.unsqueeze(1), contributions, torch.zeros_like(contributions))
    if clip:
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows * (clip / norms.clamp(min=clip))
    total = shard.sum(torch.cat([rows.sum(0), sound.sum().reshape(1).to(rows)]))
    return total[:-1] / total[-1].clamp(min=1), int(total[-1])


def as_worst(losses: Tensor, worst: float | None) -> Tensor:
    """``losses``, with ``worst`` for those that are not finite; as they are for None."""
    return losses if worst is None else torch.where(torch.isfinite(losses), losses, worst)


def window_metrics(losses: Tensor, count: int, inner_steps: int, worst: float | None) -> dict[str, float]:
    """The metrics of `GradientEstimator.estimate`.

    Args:
        losses: [N, ...], of the copies of all processes; not finite where one diverged.
        count: of the copies in the mean.
        inner_steps: see there.
        worst: the inner problem's.
    """
    died = float((~torch.isfinite(losses).reshape(len(losses), -1).all(1)).sum())
    losses = as_worst(losses, worst)
    finite = losses[torch.isfinite(losses)]
    return {
        "meta_loss": float(finite.mean()) if finite.numel() else float("nan"),
        "diverged": float(len(losses) - count),
        "worst": 0.0 if worst is None else died,
        "inner_steps": float(inner_steps),
    }
