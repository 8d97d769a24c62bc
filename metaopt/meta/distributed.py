"""Meta-training over processes and machines, through torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# has the process group as a default argument: imported later, it would keep gloo's threads alive until the process exits,
# which they sometimes abort
import torch.distributed.nn
from torch import Tensor

from metaopt import tree
from metaopt.meta.shard import ALONE, Shard, block


class Distributed(Shard):
    """One process of the default process group; CPU tensors travel over gloo, CUDA tensors over NCCL."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def sum(self, value: Tensor) -> Tensor:
        """An all-reduce, whose order of summation depends on nothing but the number of processes."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def gather(self, own: tree.Tree, n: int) -> tree.Tree:
        """One all-gather of a byte matrix with a row per copy, on the device of the first leaf."""
        leaves = list(tree.leaves(own))
        columns = [leaf.detach().unsqueeze(-1).flatten(1).contiguous().view(torch.uint8) for leaf in leaves]
        rows = torch.cat([column.to(leaves[0].device) for column in columns], dim=1)
        longest = -(-n // self.world)
        padded = rows.new_zeros(longest, rows.shape[1])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded)
        shares = [block(n, rank, self.world) for rank in range(self.world)]
        whole = torch.cat([theirs[: end - start] for theirs, (start, end) in zip(everyone, shares, strict=True)])
        pieces = iter(whole.split([column.shape[1] for column in columns], dim=1))

        def take(leaf: Tensor) -> Tensor:
            piece = next(pieces).clone(memory_format=torch.contiguous_format)  # a storage of its own: aligned
            return piece.flatten().view(leaf.dtype).reshape(n, *leaf.shape[1:]).to(leaf.device)

        return tree.map_tree(take, own)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, pickled: the processes of one run trust each other."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


@contextmanager
def process_group(device: str = "cpu", timeout: timedelta = timedelta(minutes=30)) -> Iterator[Shard]:
    """Join the processes that torchrun started, for the length of a ``with``; without torchrun: `ALONE`.

    Args:
        device: where the inner runs go; for "cuda" each process's current device becomes the GPU of its local rank.
        timeout: how long a process waits for the others before it stops with an error. A process that dies is noticed at
            once, a machine that falls silent after this time, in which the slowest share of an evaluation must fit.

    Raises:
        ValueError: ``device`` names one GPU for all, or there are fewer GPUs than processes on this machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if device != "cpu":
        _take_gpu(device, int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun then keeps one store for all restarts, in which a restarted group would find the addresses of the dead
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield Distributed()
    finally:
        dist.destroy_process_group()


def _take_gpu(device: str, local_rank: int) -> None:
    if device != "cuda":
        raise ValueError(
            f"device must be cpu or cuda under torchrun, got {device!r}; each process takes a GPU of its own"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()} or fewer"
        )
    torch.cuda.set_device(local_rank)
