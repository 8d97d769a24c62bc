"""How long the episodes of meta-training are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from metaopt.random import hash64
from metaopt.rule import Declared
from metaopt.space import option

_STREAM = 1 << 42  # of a seed's random numbers, apart from those of its initial parameters and batches


class TruncationSchedule(Declared, ABC):
    """Lengths of episodes, in inner steps."""

    @abstractmethod
    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        """One length per seed [M], int64, at least 1: a pure function of each seed and the window's number."""


class Constant(TruncationSchedule):
    """Every episode has ``length`` steps."""

    length: int = option(200, low=1, doc="inner steps")

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        """The constant."""
        return torch.full((len(seeds),), self.length)


class LogUniform(TruncationSchedule):
    """log T uniform between log ``shortest`` and log ``longest``, both included.

    Metz et al. 2022 (VeLO, arXiv:2211.09760) use 200 to 20,000.
    """

    shortest: int = option(100, low=1, doc="inner steps")
    longest: int = option(2000, low=1, doc="inner steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_order(shortest=self.shortest, longest=self.longest)

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        """Drawn per seed."""
        return _log_uniform(seeds, self.shortest, self.longest)


class Growing(TruncationSchedule):
    """As `LogUniform`, but log ``longest`` rises linearly from log ``longest_at_first`` in the first ``windows`` windows.

    Short episodes first: their meta-gradients have a lower variance (Metz et al. 2019, arXiv:1810.10180).
    """

    shortest: int = option(20, low=1, doc="inner steps")
    longest_at_first: int = option(50, low=1, doc="inner steps")
    longest: int = option(2000, low=1, doc="inner steps")
    windows: int = option(1000, low=1, doc="windows of a task until longest is reached")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_order(shortest=self.shortest, longest_at_first=self.longest_at_first, longest=self.longest)

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        """Drawn per seed."""
        share = min(window / self.windows, 1.0)
        longest = self.longest_at_first * (self.longest / self.longest_at_first) ** share
        return _log_uniform(seeds, self.shortest, round(longest))


def _log_uniform(seeds: Tensor, low: int, high: int) -> Tensor:
    share = (hash64(hash64(seeds) + _STREAM) >> 11).double() * 2.0**-53 + 0.5  # in [0, 1); the shift keeps signs
    lengths = low * torch.exp(share * math.log((high + 1) / low))
    return lengths.long().clamp(low, high)


def _require_order(**lengths: int) -> None:
    if sorted(lengths.values()) != list(lengths.values()):
        given = ", ".join(f"{name}={value}" for name, value in lengths.items())
        raise ValueError(f"{' <= '.join(lengths)} must hold, got {given}")
