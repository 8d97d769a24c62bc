"""Which copies of a meta-training run are this process's, and what the processes tell each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.tree import Tree


class Shard:
    """This process's share of N copies: a contiguous block, so that gathering in rank order restores the order of copies.

    The base class is a single process that owns everything; `metaopt.meta.distributed.Distributed` is one of several.
    All methods but `own` are collective: every process calls them, in the same order.

    Attributes:
        rank, world: which of how many processes.
    """

    rank: int = 0
    world: int = 1

    def own(self, n: int) -> Tensor:
        """Numbers of this process's copies, int64, increasing; may be empty."""
        return torch.arange(*block(n, self.rank, self.world))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each."""
        return value

    def gather(self, own: Tree, n: int) -> Tree:
        """Leaves [n_own, ...] of every process -> [n, ...] in the order of copies, the same bits on each."""
        return own

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` (numbers, text, bytes, CPU tensors and containers of them) on every process."""
        return value


def block(n: int, rank: int, world: int) -> tuple[int, int]:
    """First copy of a rank and the first beyond: shares differ by at most one."""
    return rank * n // world, (rank + 1) * n // world


ALONE = Shard()
