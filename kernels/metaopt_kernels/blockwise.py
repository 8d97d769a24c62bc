"""Steps of elementwise rules that keep their state in 8 bits: `metaopt.eight_bit` says what a block and a code are.

Codes here are computed, not searched for: nearest numbers but for a rounding of float32 in the middle between two.
"""

# Triton compiles some of these functions, and finds their types itself.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaopt import registry
from metaopt.eight_bit import BLOCK, Blockwise, dynamic_map
from metaopt.program.columns import are_flat
from metaopt.program.cpp import identifiers
from metaopt.program.program import Program
from metaopt_kernels.aot import AotCase
from metaopt_kernels.source import load_module
from metaopt_kernels.statements import IMPORTS, TYPES, indented, rounded, statements
from metaopt_kernels.tables import DEVICE, on_device, table

ROWS = 4
"""Blocks of one program: 1024 elements, two loads of 16 bytes per thread where they are float32."""

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # torch rounds after each operation


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def decode(codes, absmax, numbers):
    """Values [ROWS, BLOCK] of ``codes`` [ROWS, BLOCK] and ``absmax`` [ROWS]; ``numbers`` points to the map, float32 [256]."""
    return tl.load(numbers + codes.to(tl.int32)) * absmax[:, None]


@triton.jit
def encode(values, SIGNED: tl.constexpr):
    """Codes [ROWS, BLOCK] and absmax [ROWS] of ``values`` [ROWS, BLOCK] float32.

    A NaN makes its block's absmax NaN: it spreads, but is not lost.
    """
    absmax = tl.max(tl.abs(values), 1)
    absmax = tl.where(tl.max((values != values).to(tl.int32), 1) > 0, float("nan"), absmax)
    scaled = tl.div_rn(values, tl.zeros_like(values) + tl.where(absmax == 0.0, 1.0, absmax)[:, None])
    size = tl.abs(scaled) if SIGNED else scaled
    top: tl.constexpr = 6 if SIGNED else 7
    code = tl.zeros_like(size)
    for zeros in tl.static_range(6, -1, -1):
        bins = 2.0 ** (top - zeros)
        # the middle to the number below: 0, or the last one of the decade below, whose bins are a fifth as wide
        least = 0.5e-6 * (0.1 + 0.45 / bins) if zeros == 6 else 10.0**-zeros * (0.1 + 0.18 / bins)
        fraction = tl.floor((size * 10.0**zeros - 0.1) * (bins / 0.9))
        code = tl.where(size > least, bins + tl.minimum(tl.maximum(fraction, 0.0), bins - 1.0), code)
    one = size > 1.0 - 0.225 / 2.0**top
    if SIGNED:
        code = tl.where((scaled < 0.0) & (code > 0.0), code + 128.0, code)
        code = tl.where(one & (scaled > 0.0), 128.0, code)
    else:
        code = tl.where(one, 1.0, code)
    return code.to(tl.int32).to(tl.uint8), absmax


@triton.jit
def quantise_blocks(values, codes, absmax, size, SIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``ROWS`` blocks of a flat tensor of ``size`` elements."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    found, largest = encode(tl.load(values + lanes, lanes < size, 0.0).to(tl.float32), SIGNED)
    tl.store(codes + lanes, found, lanes < size)
    tl.store(absmax + rows, largest, rows * BLOCK < size)


@triton.jit
def dequantise_blocks(codes, absmax, values, numbers, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``ROWS`` blocks of a flat tensor of ``size`` elements."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    largest = tl.load(absmax + rows, rows * BLOCK < size, 0.0)
    found = decode(tl.load(codes + lanes, lanes < size, 0), largest, numbers)
    tl.store(values + lanes, found, lanes < size)


def quantise(values: Tensor, signed: bool) -> Blockwise:
    """``values`` in 8 bits.

    Args:
        values: of any shape and floating dtype; computed in float32.
        signed: whether it may be negative; if not, a negative element becomes 0.
    """
    values = values.contiguous()
    blocks = triton.cdiv(values.numel(), BLOCK)
    codes = torch.empty_like(values, dtype=torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32, device=values.device)
    if blocks:
        with torch.cuda.device_of(values):
            quantise_blocks[(triton.cdiv(blocks, ROWS),)](
                values, codes, absmax, values.numel(), SIGNED=signed, ROWS=ROWS, BLOCK=BLOCK, **_OPTIONS
            )
    return Blockwise(codes, absmax)


def dequantise(stored: Blockwise, signed: bool) -> Tensor:
    """The float32 tensor that ``stored`` stands for; ``signed`` as it was quantised."""
    values = torch.empty_like(stored.codes, dtype=torch.float32)
    if len(stored.absmax):
        with torch.cuda.device_of(values):
            dequantise_blocks[(triton.cdiv(len(stored.absmax), ROWS),)](
                *stored,
                values,
                _both_maps(values.device)[0 if signed else 1],
                values.numel(),
                ROWS=ROWS,
                BLOCK=BLOCK,
                **_OPTIONS,
            )
    return values


# -- a step of a program -----------------------------------------------------------------------------------------------

# The table on the device: rows of ``count`` numbers, one for each parameter:
#     first program | elements | address of param | of grad | of the codes of each slot | of their absmax
_MODULE = """\
{imports}
from metaopt_kernels.blockwise import decode, encode

@triton.jit
def update({addresses}, coefficients, numbers, left, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = None if WHOLE else lanes < left
    some = None if WHOLE else rows * BLOCK < left
    {pointers}
    if WHOLE:
        {aligned}
    {loads}
    {statements}
    {stores}


@triton.jit(do_not_specialize=["count", "programs"])
def step(table, coefficients, numbers, count, programs, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    parameters = tl.arange(0, COUNT)
    firsts = tl.load(table + parameters, parameters < count, programs)
    row = table + tl.sum((firsts <= program).to(tl.int32)) - 1
    start = (program - tl.load(row)) * (ROWS * BLOCK)
    {lookups}
    left = tl.minimum(tl.load(row + count) - start, ROWS * BLOCK).to(tl.int32)
    if (left == ROWS * BLOCK) & (({union}) % 16 == 0):
        update({addresses}, coefficients, numbers, left, ROWS, BLOCK, True)
    else:
        update({addresses}, coefficients, numbers, left, ROWS, BLOCK, False)
"""


def blockwise_source(program: Program, signed: Sequence[bool], dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    """The module whose kernel ``step`` runs ``program`` on parameters and gradients of ``dtypes``, and slots in 8 bits."""
    names, (lines, values) = identifiers(program), statements(program, "tl.float32")
    plain = [("param", dtypes[0]), ("grad", dtypes[1])]
    codes, absmax = ([f"{part}{k}" for k in range(len(signed))] for part in ("codes", "absmax"))
    maps = ["numbers" if sign else "numbers + 256" for sign in signed]
    loads = [
        f"{names[name]} = tl.load(coefficients + {k}).to(tl.float32)" for k, name in enumerate(program.coefficients)
    ]
    loads += [
        f"{names[tensor]} = tl.load({address} + lanes, inside).to(tl.float32)"
        for tensor, (address, _) in zip(program.tensors, plain, strict=False)
    ]
    loads += [
        f"{names[slot]} = decode(tl.load({c} + lanes, inside), tl.load({a} + rows, some), {numbers})"
        for slot, c, a, numbers in zip(program.tensors[2:], codes, absmax, maps, strict=True)
    ]
    stores = [f"tl.store(param + lanes, tl.broadcast_to({rounded(values[0], dtypes[0])}, lanes.shape), inside)"]
    for value, c, a, sign in zip(values[1:], codes, absmax, signed, strict=True):
        stores += [
            f"slot = tl.broadcast_to({value}, lanes.shape)",
            "if not WHOLE:",
            "    slot = tl.where(inside, slot, 0.0)",
            f"slot_codes, slot_absmax = encode(slot, {sign})",
            f"tl.store({c} + lanes, slot_codes, inside)",
            f"tl.store({a} + rows, slot_absmax, some)",
        ]
    addresses = [address for address, _ in plain] + codes + absmax
    types = [TYPES[dtype] for dtype in dtypes] + ["tl.uint8"] * len(codes) + ["tl.float32"] * len(absmax)
    offsets = [f"{dtype.itemsize} * start" for dtype in dtypes] + ["start"] * len(codes)
    offsets += ["4 * (start // BLOCK)"] * len(absmax)
    return _MODULE.format(
        imports=IMPORTS,
        addresses=", ".join(addresses),
        union=" | ".join(addresses),
        lookups=indented(
            f"{address} = tl.load(row + {k} * count) + {offset}"
            for k, (address, offset) in enumerate(zip(addresses, offsets, strict=True), start=2)
        ),
        pointers=indented(f"{a} = {a}.to(tl.pointer_type({t}))" for a, t in zip(addresses, types, strict=True)),
        aligned=indented((f"{address} = tl.multiple_of({address}, 16)" for address in addresses), depth=2),
        loads=indented(loads),
        statements=indented(lines),
        stores=indented(stores),
    )


def blockwise_step(
    program: Program, signed: Sequence[bool], dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
) -> BlockwiseStep | None:
    """The step of ``program`` whose slots are kept in 8 bits: one pass that reads them, computes in float32 and writes them.

    Args:
        program: what to run.
        signed: for each slot, whether it may be negative: momentum is, a mean of squares is not.
        dtypes: of parameters and gradients: float32, bfloat16 or float16.

    Returns:
        The step, or None for other dtypes.

    Raises:
        ValueError: not one sign per slot.
        OSError: the cache directory cannot be written.
    """
    slots = program.tensors[2:]
    if len(signed) != len(slots):
        raise ValueError(f"signed must say it of each slot ({', '.join(slots) or 'there is none'}), got {signed}")
    if any(dtype not in TYPES or dtype == torch.float64 for dtype in dtypes):
        return None
    module = load_module(blockwise_source(program, signed, dtypes), "blockwise")
    return BlockwiseStep(program, dtypes, module.step)


class BlockwiseStep:
    """One step of a program over many tensors of one GPU, in place, with slots in 8 bits.

    Attributes:
        program: what it runs.
        dtypes: of parameters and gradients.
    """

    def __init__(self, program: Program, dtypes: tuple[torch.dtype, torch.dtype], kernel: Any) -> None:
        self.program = program
        self.dtypes = dtypes
        self._kernel = kernel

    def fits(self, params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Sequence[Blockwise]]) -> bool:
        """Whether the step may run on these: all on one GPU, flat (`are_flat`) and of its dtypes."""
        columns = [params, grads, *([slot.codes for slot in column] for column in slots)]
        scales = [[slot.absmax for slot in column] for column in slots]
        devices = {tensor.device for tensor in chain(*columns, *scales)}
        return (
            len(devices) == 1
            and devices.pop().type == DEVICE
            and len(slots) == len(self.program.tensors) - 2
            and are_flat(columns, (*self.dtypes, torch.uint8))
            and all(
                scale.dtype == torch.float32 and scale.is_contiguous() and len(scale) == triton.cdiv(p.numel(), BLOCK)
                for column in scales
                for scale, p in zip(column, params, strict=True)
            )
        )

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        slots: Sequence[Sequence[Blockwise]],
        coefficients: Mapping[str, float],
    ) -> None:
        """Update parameters and slots in place.

        Args:
            params: tensors that fit: their addresses are taken as they are.
            grads: one for each parameter.
            slots: for each slot of the program one `Blockwise` per parameter; `quantise` makes the first.
            coefficients: a float per name in ``program.coefficients``, rounded to float32.
        """
        sizes = tuple(p.numel() for p in params)
        firsts = (0, *accumulate(triton.cdiv(size, ROWS * BLOCK) for size in sizes))
        programs = firsts[-1]
        if programs == 0:
            return
        device = params[0].device
        parts = [[slot[part] for slot in column] for part in (0, 1) for column in slots]
        addresses = map(Tensor.data_ptr, chain(params, grads, *parts))
        with torch.cuda.device_of(params[0]):
            where = table((*firsts[:-1], *sizes, *addresses), device)
            numbers = on_device([coefficients[name] for name in self.program.coefficients], torch.float64, device)
            self._kernel[(programs,)](
                where, numbers, _both_maps(device), len(sizes), programs,
                COUNT=triton.next_power_of_2(len(sizes)), ROWS=ROWS, BLOCK=BLOCK, **_OPTIONS,
            )  # fmt: skip
        torch.autograd.graph.increment_version(params)


@functools.lru_cache(maxsize=64)
def _both_maps(device: torch.device) -> Tensor:
    """Of signed and of unsigned codes, float32 [2, 256]."""
    return torch.stack([dynamic_map(True), dynamic_map(False)]).to(device, torch.float32)


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """AdamW's step, and the kernels of `quantise` and `dequantise`."""
    options = {name: value for name, value in _OPTIONS.items() if name != "num_warps"}
    sizes = {"ROWS": ROWS, "BLOCK": BLOCK}
    cases = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        source = blockwise_source(registry.create("optimizer", "adamw").program, (True, False), (dtype, dtype))
        signature = {"table": "*i64", "coefficients": "*fp64", "numbers": "*fp32", "count": "i32", "programs": "i32"}
        step = load_module(source, "blockwise").step
        pointers = ("table", "coefficients", "numbers")
        cases.append(AotCase(f"blockwise.adamw.{name}", step, signature, {"COUNT": 256, **sizes}, 4, pointers, options))
    stored = {"codes": "*u8", "absmax": "*fp32", "values": "*fp32", "size": "i32"}
    pointers = ("values", "codes", "absmax")
    for signed in (True, False):
        name = f"blockwise.quantise.{'signed' if signed else 'unsigned'}"
        cases.append(AotCase(name, quantise_blocks, stored, {"SIGNED": signed, **sizes}, 4, pointers, options))
    signature = {**stored, "numbers": "*fp32"}
    cases.append(
        AotCase("blockwise.dequantise", dequantise_blocks, signature, sizes, 4, (*pointers, "numbers"), options)
    )
    return cases
