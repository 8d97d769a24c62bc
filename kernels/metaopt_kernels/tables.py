"""Small tables that kernels read, brought to the device as arguments of launches.

Copies of host memory would make the host wait, or would have to outlive every CUDA graph that recorded them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
"""The kind of device whose tensors kernels take."""


def on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of ``numbers``, which are the same in every replay of a CUDA graph that records this."""
    made = torch.ones(len(numbers), dtype=dtype, device=device)
    if numbers:
        torch._foreach_mul_(made.unbind(), [*numbers])
    return made


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The int64 tensor of ``numbers``, kept for the next call: a training loop's tensors stay where they are, or come back.

    While a CUDA graph is recorded a new one is made, for its memory must be the graph's.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return on_device(numbers, torch.int64, device)
    return _kept(numbers, device)


@functools.lru_cache(maxsize=256)
def _kept(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return on_device(numbers, torch.int64, device)
