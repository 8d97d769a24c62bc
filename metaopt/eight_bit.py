"""Optimizer state in 8 bits: blocks of 256 elements, each with codes of its own scale, and the rule that keeps its state so.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861): a block is divided by
its largest magnitude (``absmax``), and each element becomes the code of the nearest number of a map. A code of the map is::

    signed:    sign | E zeros | 1 | 6 - E bits of fraction
    unsigned:         E zeros | 1 | 7 - E bits of fraction        E = 0 .. 6, for slots that are never negative

and says 10^-E times the middle of its bin of [0.1, 1], which the fraction divides evenly. Two codes are left: all zeros is 0,
and the other (signed: a sign without magnitude; unsigned: E = 7) is 1, so that a block's largest element is exact if positive.
An element between absmax and 0.1 absmax is off by at most 0.71 % of absmax signed, 0.36 % unsigned; each decade below, down
to 1e-7 absmax, by a fifth of that of the one above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.rule import (
    Context,
    Declared,
    ElementwiseRule,
    HyperValues,
    ParamInfo,
    Params,
    State,
    UpdateRule,
    compute_dtype,
)
from metaopt.space import option

BLOCK = 256
"""Elements with one absmax."""


class Blockwise(NamedTuple):
    """A tensor in 8 bits.

    Attributes:
        codes: uint8, of the tensor's shape, contiguous.
        absmax: float32 [ceil(elements / 256)].
    """

    codes: Tensor
    absmax: Tensor


def dynamic_map(signed: bool) -> Tensor:
    """The number in [-1, 1] of every code, float64 [256]."""
    top = 6 if signed else 7
    sizes = [0.0] * (128 if signed else 256)
    for zeros in range(7):
        bins = 2 ** (top - zeros)
        for fraction in range(bins):
            sizes[bins + fraction] = 10.0**-zeros * (0.1 + 0.9 * (fraction + 0.5) / bins)
    if signed:
        return torch.tensor([*sizes, 1.0, *(-size for size in sizes[1:])], dtype=torch.float64)
    sizes[1] = 1.0
    return torch.tensor(sizes, dtype=torch.float64)


def quantise(values: Tensor, signed: bool) -> Blockwise:
    """``values`` in 8 bits.

    Args:
        values: of any shape and floating dtype; rounded to float32 first.
        signed: whether it may be negative; if not, a negative element becomes 0.
    """
    flat = values.detach().reshape(-1).to(torch.float32)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)  # NaN if any is
    numbers, codes = dynamic_map(signed).to(flat.device).sort()
    middles = ((numbers[1:] + numbers[:-1]) / 2).to(torch.float32)
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    found = codes[torch.searchsorted(middles, torch.where(scaled.isnan(), 0.0, scaled))].to(torch.uint8)
    return Blockwise(found.reshape(-1)[: len(flat)].reshape(values.shape), absmax)


def dequantise(stored: Blockwise, signed: bool) -> Tensor:
    """The float32 tensor that ``stored`` stands for; ``signed`` as it was quantised."""
    numbers = dynamic_map(signed).to(stored.codes.device, torch.float32)[stored.codes.reshape(-1).long()]
    scales = stored.absmax.repeat_interleave(BLOCK)[: len(numbers)]
    return (numbers * scales).reshape(stored.codes.shape)


class EightBitState(UpdateRule):
    """An elementwise rule whose state takes 8 bits per element (8.125 with the scales), computed in float32 as ever.

    State per parameter: for each slot of the rule its codes under the slot's name, and ``{slot}_absmax``; see `Blockwise`.
    Between steps each element is off by at most 0.71 % of the largest of its block, or 0.36 % in slots that the rule calls
    ``nonnegative``. Parameters of less than ``min_size`` elements keep their state as it is: they take little memory, and
    noise in norms and biases harms most. No gradient flows through the codes.

    Dettmers et al., 2022 (https://arxiv.org/abs/2110.02861), who also advise 32 bits for embeddings: give those a param
    group with a large ``min_size``.

    Raises:
        TypeError: ``rule`` is not an elementwise rule.
    """

    rule: ElementwiseRule
    min_size: int = option(4096, low=1, doc="parameters of fewer elements keep their state in float32")

    def __post_init__(self) -> None:
        if not isinstance(self.rule, ElementwiseRule):
            got = self.rule.label() if isinstance(self.rule, Declared) else repr(self.rule)
            raise TypeError(
                f"EightBitState takes an elementwise rule, as in EightBitState(AdamW()), got {got}; "
                "wrappers go around it: Chain(..., EightBitState(AdamW()))"
            )
        super().__post_init__()

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """See the class."""
        for name, param in params.items():
            if hasattr(param, "to_local"):
                raise ValueError(f"8-bit state of a sharded parameter ({name!r}) is not supported; use the rule alone")
        state = self.rule.init(params, info)
        return {name: self.stored(slots) for name, slots in state.items()}

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The rule's step, between reading and writing 8 bits."""
        wide = {name: self.read(state[name], compute_dtype(param.dtype)) for name, param in params.items()}
        new_params, new_state = self.rule.update(grads, wide, params, hp, ctx)
        return new_params, {name: self.stored(slots) for name, slots in new_state.items()}

    def is_signed(self, slot: str) -> bool:
        """Whether the slot may hold negative numbers."""
        return slot not in self.rule.nonnegative

    def stored(self, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rule's own state of one parameter as it is kept."""
        found = {"step": slots["step"]}
        for slot in self.rule.slots:
            if slots[slot].numel() < self.min_size:
                found[slot] = slots[slot]
            else:
                found[slot], found[f"{slot}_absmax"] = quantise(slots[slot], self.is_signed(slot))
        return found

    def read(self, slots: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Inverse of `stored`, within the error of the class."""
        found = {"step": slots["step"]}
        for slot in self.rule.slots:
            found[slot] = slots[slot]
            if f"{slot}_absmax" in slots:
                codes = Blockwise(slots[slot], slots[f"{slot}_absmax"])
                found[slot] = dequantise(codes, self.is_signed(slot)).to(dtype)
        return found
