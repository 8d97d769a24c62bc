"""Columns of tensors as generated code takes them: flat memory, element beside element."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor


def are_flat(columns: Sequence[Sequence[Tensor]], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> bool:
    """Whether one walk over flat memory meets the elements of one index in all tensors of a parameter, for every parameter.

    Args:
        columns: parameters, gradients and slots: one tensor per parameter in each.
        dtypes: that these must have. Their tensors must also be dense, and those of one parameter must agree in shape and,
            unless they are contiguous, in strides.
    """
    tensors = [*chain.from_iterable(columns)]
    sizes = [*map(Tensor.numel, tensors)]
    if sizes != sizes[: len(columns[0])] * len(columns):
        return False
    if len({*dtypes}) == 1:
        if {*map(_dtype, tensors)} - {*dtypes}:
            return False
    elif any([{*map(_dtype, column)} - {dtypes[min(k, 2)]} for k, column in enumerate(columns)]):
        return False
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    return all(_same_layout(tensors) for tensors in zip(*columns, strict=True))


_dtype = attrgetter("dtype")


def _same_layout(tensors: Sequence[Tensor]) -> bool:
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    strides = tensors[0].stride()
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    return all(t.stride() == strides for t in tensors) and tensors[0].permute(order).is_contiguous()
