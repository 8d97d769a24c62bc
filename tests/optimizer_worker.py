"""What `test_torch_optimizer_learned` starts in two processes, each of which checks what it ends with.

Run as ``torchrun ... optimizer_worker.py``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from optimizer_cases import flat, loss_at, make, net
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS = 3


def everywhere(value: Tensor) -> list[Tensor]:
    """``value`` of every process."""
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    return found


def train_replicas(**options: Any) -> Tensor:
    """Data-parallel steps of VeLO, each process with batches and losses of its own."""
    model = net()
    parallel, optimizer = DistributedDataParallel(model), make("velo", model.parameters(), **options)
    for step in range(STEPS):
        parallel.zero_grad()
        loss = loss_at(parallel, 2 * step + dist.get_rank())
        loss.backward()
        optimizer.step(loss)
    return flat(model)


def train_alone() -> Tensor:
    """The same in one process: the loss is the mean over both batches."""
    model = net()
    optimizer = make("velo", model.parameters(), loss_group=None)
    for step in range(STEPS):
        model.zero_grad()
        loss = (loss_at(model, 2 * step) + loss_at(model, 2 * step + 1)) / 2
        loss.backward()
        optimizer.step(loss)
    return flat(model)


def check_replicas() -> None:
    alone = train_alone()
    for group in ("world", dist.group.WORLD):
        first, second = everywhere(train_replicas(loss_group=group))
        assert torch.equal(first, second), "replicas drifted apart"
        torch.testing.assert_close(first, alone, rtol=1e-9, atol=1e-12)
    first, second = everywhere(train_replicas(loss_group=None))
    assert not torch.equal(first, second), "VeLO takes no notice of the loss, so nothing was tested"


def check_shards(rule: str) -> None:
    """FSDP2 on two processes, which share no tensor evenly."""
    whole, sharded = net(), net()
    for model in (whole, sharded):
        model.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))  # FSDP refuses 0-d parameters
    fully_shard(sharded)
    for model in (whole, sharded):
        optimizer = make(rule, model.parameters())
        for step in range(2):
            model.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            optimizer.step(loss)
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Found a non-scalar tensor")  # DTensor, of tensors of one element
    dist.init_process_group("gloo")
    check_replicas()
    for rule in ("learned", "celo2", "velo", "adafactor"):
        check_shards(rule)
    dist.destroy_process_group()
    os._exit(0)  # device meshes outlive the group, and gloo's threads would abort an orderly exit now and then
