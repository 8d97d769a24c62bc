"""Functions of losses that stay finite wherever a loss may be evaluated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def bounded_exp(x: Any) -> Any:
    """exp(x), which goes on along its tangent where it would soon overflow: beyond 66 in float32, 532 in float64.

    So it stays convex, and its slope finite. In a program, which has no dtype, the limit is that of float32.
    """
    dtype = x.dtype if isinstance(x, Tensor) else torch.float32
    edge = math.floor(0.75 * math.log(torch.finfo(dtype).max))  # leaves e^22 for factors, slopes and sums
    return torch.exp(torch.clamp(x, max=edge)) * (1 + torch.relu(x - edge))


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, to full precision (Maechler 2012); x above -1e-6 counts as that."""
    x = torch.clamp(x, max=-1e-6)
    near = x > -math.log(2)
    # each branch sees only its own numbers: a gradient of 0 times infinity is NaN
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)), with p at most 1 - 1e-6."""
    log_p = torch.clamp(log_p, max=-1e-6)
    return log_p - log_one_minus_exp(log_p)


def standard_deviation(x: Tensor) -> Tensor:
    """Of a sample [B], with B - 1 below; 0, with slope 0, of one number or of equal ones."""
    variance = sample_variance(x)
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def sample_variance(x: Tensor) -> Tensor:
    """Of a sample [B], with B - 1 below; 0 of one number."""
    return (x - x.mean()).square().sum() / max(len(x) - 1, 1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The score of the right class less the largest other one: [B, C], [B] -> [B]."""
    right = F.one_hot(labels, logits.shape[-1]).bool()
    others = logits.masked_fill(right, -math.inf)
    return logits.gather(-1, labels[..., None]).squeeze(-1) - others.amax(-1)
