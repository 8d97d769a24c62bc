"""Stateless random numbers: pure functions of integers, so every copy, pair, resumed run and device draws the same.

The bits are splitmix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") of a counter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of splitmix64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB
_KEY_STREAM = 1 << 40  # separates the keys of a step from its example indices


def hash64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors, element by element: a stateless source of random bits."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) shift; torch's ``>>`` on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_indices(seeds: Tensor, steps: Tensor, batch_size: int, size: int) -> Tensor:
    """Example indices [K, batch_size], uniform with replacement, a pure function of (seed, step).

    Being stateless, they let antithetic runs, resumed runs and re-ordered copies see the same batches on any device.

    Args:
        seeds: int64 [K], one data stream per copy.
        steps: int64 [K], how many batches each copy has drawn already.
        batch_size: examples per batch.
        size: number of examples; at most 2^31.
    """
    stream = hash64(hash64(seeds) + steps).unsqueeze(-1)
    lane = torch.arange(batch_size, dtype=torch.int64, device=seeds.device)
    return _shift_right(hash64(stream + lane), 33) % size


def step_keys(seeds: Tensor, steps: Tensor) -> Tensor:
    """The key [...] int64 of each copy's step, for whatever a loss draws besides its batch; broadcasts."""
    return hash64(hash64(hash64(seeds) + steps) + _KEY_STREAM)


def uniform(key: Tensor, shape: Sequence[int], stream: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform numbers in (0, 1) of ``shape``, a pure function of ``key`` (0-d int64) and ``stream``; vmap-safe.

    Args:
        key: `step_keys` of one copy and step; a task finds it in its batch as ``random``.
        shape: of the result.
        stream: one number per use, so that two draws of one step differ.
        dtype: default float32; narrower ones are rounded from it.
    """
    dtype = dtype or torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    lane = torch.arange(math.prod(shape), dtype=torch.int64, device=key.device)
    bits = _shift_right(hash64(hash64(key + stream) + lane), 41)  # 23 bits: with the half below exact in float32
    return ((bits.to(wide) + 0.5) * 2.0**-23).to(dtype).reshape(tuple(shape))


def normal(key: Tensor, shape: Sequence[int], stream: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal numbers by Box and Muller's transform of two `uniform` draws; arguments as there."""
    dtype = dtype or torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    radius = (-2 * uniform(key, shape, 2 * stream + (1 << 20), wide).log()).sqrt()
    return (radius * (2 * math.pi * uniform(key, shape, 2 * stream + (1 << 20) + 1, wide)).cos()).to(dtype)
