"""Random numbers that data are made of: from a seeded CPU generator, in float64 until the data are rounded to float32."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def uniform(generator: Generator, *shape: int) -> Tensor:
    """Float64 numbers in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def normal(generator: Generator, *shape: int) -> Tensor:
    """Float64 standard normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def student_t(generator: Generator, freedom: float, *shape: int) -> Tensor:
    """Float64 numbers of Student's t distribution with ``freedom`` > 0 degrees, by its polar form.

    sqrt(freedom (u^(-2 / freedom) - 1)) cos(2 pi v), u in (0, 1] (Bailey, 1994, Mathematics of Computation 62, p. 779).
    """
    u, v = 1 - uniform(generator, *shape), uniform(generator, *shape)
    return (freedom * (u ** (-2 / freedom) - 1)).sqrt() * (2 * math.pi * v).cos()


def categorical(generator: Generator, logits: Tensor) -> Tensor:
    """One class [N] int64 for each row of ``logits`` [N, classes], drawn from its softmax by Gumbel noise."""
    return (logits - (-uniform(generator, *logits.shape).log()).log()).argmax(1)
