"""Losses of K trained copies on a whole split, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaopt import tree
from metaopt.random import step_keys
from metaopt.rule import Params
from metaopt.task import Batch, Split, Task

EXAMPLES_AT_ONCE = 8192
"""Copies x examples of one forward pass; a training step keeps copies x batch_size with their whole graph."""


@torch.no_grad()
def split_losses(
    task: Task,
    params: Params,
    split: Split,
    config: Mapping[str, Tensor] | None = None,
    *,
    max_examples: int | None = None,
    chunk: int | None = None,
    vmapped: bool = True,
) -> Tensor:
    """Mean loss of every copy over ``split``: float64 [K].

    Args:
        task: whose ``loss`` is a mean over examples, so that chunks can be averaged by their sizes.
        params: tensors [K, ...].
        split: the examples; all copies see the same ones.
        config: numbers of family members and buffers of the runs, tensors [K, ...].
        max_examples: at most so many examples: a subset drawn once, the same in every call.
        chunk: examples per forward pass; default `EXAMPLES_AT_ONCE` / K, but at least the task's batch size.
        vmapped: all copies at once; False for losses that ``vmap`` cannot take, one copy after the other.
    """
    config = dict(config or {})
    copies = len(next(iter(params.values())))
    chunk = chunk or max(task.batch_size, EXAMPLES_AT_ONCE // copies)
    indices = _subset(len(split), max_examples).to(next(iter(params.values())).device)

    def one_copy(copy: Params, batch: Batch, numbers: Batch) -> Tensor:
        return task.loss(copy, batch | numbers)

    def one_by_one(copies_: Params, batch: Batch, numbers: Batch) -> Tensor:
        return torch.stack([one_copy(tree.index(copies_, k), batch, tree.index(numbers, k)) for k in range(copies)])

    losses = torch.func.vmap(one_copy, in_dims=(0, None, 0)) if vmapped else one_by_one
    total = torch.zeros(copies, dtype=torch.float64, device=indices.device)
    for i, part in enumerate(indices.split(chunk)):
        batch = split.take(part)
        if task.stochastic:  # the same draws for all copies, in every call
            batch["random"] = step_keys(torch.zeros((), dtype=torch.int64, device=indices.device), torch.tensor(i))
        total += losses(params, batch, config).to(torch.float64) * len(part)
    return total / len(indices)


def _subset(size: int, limit: int | None) -> Tensor:
    if limit is None or size <= limit:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit].sort().values
