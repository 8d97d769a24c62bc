"""One step of a per-parameter rule in place, a chunk of elements at a time, so that the features of few elements exist at once.

Plain torch on any device, no compiler. A tensor is walked three times: to move its accumulators, to measure its features,
whose divisors are known only then, and to run the network. On a CPU the features of a chunk stay in the cache.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from metaopt.perparameter.features import (
    Decays,
    Factors,
    Features,
    Slots,
    accumulate,
    blend,
    blocks,
    clip,
    corrected,
    factored_axes,
    factors,
    norm_axes,
)
from metaopt.perparameter.rule import Layers, PerParameterRule, run_layers
from metaopt.rule import compute_dtype

CPU_CHUNK = 1 << 14
"""Most elements of a chunk on a CPU: about forty features of them fill a core's cache."""
DEVICE_CHUNK = 1 << 20
"""And elsewhere: enough to keep an accelerator busy."""

Part = tuple[slice, ...]
"""What of a tensor [*shape] a chunk is."""


@lru_cache(maxsize=4096)
def parts_of(shape: tuple[int, ...], most: int) -> tuple[Part, ...]:
    """``shape`` cut into parts of up to ``most`` elements (one at least), in order."""
    axis = 0
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) > most:
        axis += 1
    if not shape:
        return ((),)
    pieces = math.ceil(shape[axis] / max(most // math.prod(shape[axis + 1 :]), 1))
    bounds = [shape[axis] * i // pieces for i in range(pieces + 1)]
    cuts = [slice(*ends) for ends in itertools.pairwise(bounds)]
    whole = [slice(None)] * (len(shape) - axis - 1)
    outer = itertools.product(*([slice(i, i + 1) for i in range(size)] for size in shape[:axis]))
    return tuple((*at, cut, *whole) for at in outer for cut in cuts)


def step_in_chunks(
    rule: PerParameterRule, decays: Decays, layers: Layers, scale: Tensor, keep: Tensor, grad: Tensor, param: Tensor,
    slots: Slots, t: Tensor,
) -> None:  # fmt: skip
    """One step of one parameter, in place; a rule with its own finish gets all of the network's outputs at once.

    Args:
        rule: what steps it.
        decays: of the accumulators.
        layers: its network.
        scale: as in `Prepared`.
        keep: likewise.
        grad: [*shape], not clipped yet.
        param: [*shape] of any dtype and strides; overwritten.
        slots: its accumulators; overwritten.
        t: 0-d, counts updates from 1.
    """
    if not param.numel():
        return
    dtype = compute_dtype(param.dtype)
    chunks = _Chunks(rule.features, decays, grad, param, slots, t)
    chunks.accumulate()
    inverse = chunks.inverse_rms()
    one_divisor = inverse[0].numel() == 1
    if one_divisor:
        (weight, bias), *rest = layers
        layers = ((inverse.reshape(-1, 1) * weight.to(dtype), bias), *rest)
    outputs = len(layers[-1][1])
    kept = torch.empty((outputs, *param.shape), dtype=dtype, device=param.device) if rule.has_own_finish else None
    for part in chunks.parts:
        seen = chunks.features_of(part)
        found = run_layers(layers, seen if one_divisor else seen * at(inverse, part))
        if kept is None:
            moved = rule.finish(found, param[part].to(dtype), chunks.slots_of(part), scale, keep)
            param[part].copy_(moved)
        else:
            kept[(slice(None), *part)] = found
    if kept is not None:
        param.copy_(rule.finish(kept, param.to(dtype), slots, scale, keep))


class _Chunks:
    """A parameter with its gradient and accumulators, of which the methods take a part at a time."""

    def __init__(
        self, features: Features, decays: Decays, grad: Tensor, param: Tensor, slots: Slots, t: Tensor
    ) -> None:
        self.features, self.decays, self.grad, self.param, self.slots, self.t = features, decays, grad, param, slots, t
        self.shape, self.dtype = tuple(param.shape), compute_dtype(param.dtype)
        axes = factored_axes(self.shape, features.layout) if features.factored else None
        self.axes = axes
        self.averaged = (
            {} if axes is None else {"row": axes[1], "col": axes[0]}
        )  # slot -> the axis that it is a mean over
        self.parts = parts_of(self.shape, CPU_CHUNK if param.is_cpu else DEVICE_CHUNK)
        self.factors: Factors | None = None  # a matrix has them once its rows and columns are known
        self.latest: tuple[Part, Tensor] | None = None

    def grad_of(self, part: Part) -> Tensor:
        """Clipped."""
        return clip(self.features, self.grad[part].to(self.dtype))

    def across(self, slot: str, part: Part) -> Part:
        """What of a slot's plane belongs to a part."""
        axis = self.averaged.get(slot)
        return part if axis is None else part[:axis] + part[axis + 1 :]

    def slots_of(self, part: Part) -> Slots:
        """Views; rows and columns are those that cross the part."""
        return {slot: value[(slice(None), *self.across(slot, part))] for slot, value in self.slots.items()}

    def accumulate(self) -> None:
        """Move the accumulators."""
        by_element = replace(self.features, blocks=(), factored=0) if self.averaged else self.features
        sums = {slot: torch.zeros_like(self.slots[slot][0]) for slot in self.averaged}
        for part in self.parts:
            grad, old = self.grad_of(part), self.slots_of(part)
            for slot, value in accumulate(by_element, self.decays, grad, old).items():
                old[slot].copy_(value)
            square = grad * grad + 1e-30 if sums else grad
            for slot, axis in self.averaged.items():
                sums[slot][self.across(slot, part)] += square.sum(axis)
        for slot, axis in self.averaged.items():
            mean = sums[slot] / self.shape[axis]
            self.slots[slot].copy_(blend(self.slots[slot], mean, self.decays["factored"]))
        if self.averaged:
            self.factors = factors(self.features, self.slots, self.used(self.slots), self.axes)

    def used(self, slots: Slots) -> Slots:
        """What features are made of."""
        return corrected(slots, self.decays, self.t) if self.features.bias_correction else slots

    def features_of(self, part: Part) -> Tensor:
        """Of the moved accumulators, before normalisation [F, *part]."""
        if self.latest is None or self.latest[0] is not part:
            slots = self.slots_of(part)
            used = self.used(slots)
            if self.factors is None:
                own = factors(self.features, slots, used, None)
            else:
                own = Factors(*(tuple(at(factor, part) for factor in several) for several in self.factors))
            param = self.param[part].to(self.dtype)
            self.latest = part, blocks(self.features, self.shape, param, self.grad_of(part), used, own)
        return self.latest[1]

    def inverse_rms(self) -> Tensor:
        """What normalises the features [F, *shape], of size 1 along the axes that a mean square is taken over."""
        axes = norm_axes(self.features, self.shape)
        kept = [1 if axis in axes else size for axis, size in enumerate(self.shape)]
        total = torch.zeros(self.features.count(self.shape), *kept, dtype=self.dtype, device=self.param.device)
        dims = [axis + 1 for axis in axes]
        for part in self.parts:
            seen = self.features_of(part)
            square = seen * seen
            at(total, part).add_(square.sum(dims, keepdim=True) if dims else square)
        return torch.rsqrt(self.features.norm_eps + total / math.prod([self.shape[axis] for axis in axes]))


def at(planes: Tensor, part: Part) -> Tensor:
    """What of ``planes`` [n, *shape] belongs to a part; along axes of size 1, all."""
    own = (slice(None) if size == 1 else cut for size, cut in zip(planes.shape[1:], part, strict=True))
    return planes[(slice(None), *own)]
