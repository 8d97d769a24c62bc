"""What counts of an episode's losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

OBJECTIVES = ("mean", "min", "last")


def loss_weights(losses: Tensor, lengths: Tensor, objective: str) -> Tensor:
    """Weights whose product with ``losses``, summed over steps, is the objective; like ``losses``.

    Args:
        losses: [n, S, T]; those beyond an episode's end do not count.
        lengths: of the episodes, int64 [n].
        objective: one of `OBJECTIVES`.
    """
    lengths = lengths.to(losses.device)[:, None, None]
    steps = torch.arange(losses.shape[2], device=losses.device)
    if objective == "mean":
        return ((steps < lengths).to(losses) / lengths).expand_as(losses)
    if objective == "last":
        return (steps == lengths - 1).to(losses).expand_as(losses)
    lowest = losses.masked_fill(steps >= lengths, torch.inf).argmin(2)
    return one_hot(lowest, losses.shape[2]).to(losses)
