"""One step of a `Program` over many tensors, generated from the program: in one launch, or more if it reduces tensors.

A table on the device says where everything is: rows of ``count`` numbers, one for each parameter:

    first block | elements of one copy | address of param | of grad | of each slot | of the new param | of each new slot

A program of the launch takes one block of one copy of one parameter. It looks up whose block that is, turns addresses into
those of its block and runs the statements: on whole blocks at multiples of 16 bytes with the widest loads there are, else
element by element under a mask. In place, the new parameter and slots have the addresses of the old.

The norm or mean of a tensor takes a launch before, which leaves its sum over each block; others that do not need it share the
launch. Every program then adds up the sums of its tensor, in one order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import triton
from torch import Tensor

from metaopt import registry
from metaopt.kernels import Columns, Dtypes
from metaopt.program.columns import are_flat
from metaopt.program.cpp import identifiers
from metaopt.program.ops import REDUCTIONS
from metaopt.program.program import Program, reduction_depths
from metaopt_kernels.aot import AotCase
from metaopt_kernels.source import load_module
from metaopt_kernels.statements import IMPORTS, TYPES, indented, rounded, statements
from metaopt_kernels.tables import DEVICE, on_device, table

BLOCK = 1024
"""Elements of a block: two loads of 16 bytes per thread where they are float32, one where they are bfloat16."""

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # torch rounds after each operation

# -- source ------------------------------------------------------------------------------------------------------------

_MODULE = """\
{imports}

@triton.jit
def update({addresses}, coefficients, copies, left, noise, {tensor}BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    inside = None if WHOLE else lanes < left
    {pointers}
    if WHOLE:
        {aligned}
    {loads}
    {statements}
    {stores}


@triton.jit(do_not_specialize=["seed", "count", "copies", "blocks"])
def step(table, coefficients, {sums}seed, count, copies, blocks, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    copy, block = (program // blocks).to(tl.int64), program % blocks
    parameters = tl.arange(0, COUNT)
    firsts = tl.load(table + parameters, parameters < count, blocks)
    row = table + tl.sum((firsts <= block).to(tl.int32)) - 1
    start = (block - tl.load(row)) * BLOCK
    size = tl.load(row + count)
    offset = copy * size + start
    {lookups}
    left = tl.minimum(size - start, BLOCK).to(tl.int32)
    noise = {noise}
    {reductions}
    if (left == BLOCK) & (({union}) % 16 == 0):
        update({addresses}, coefficients + copy, copies, left, noise, {tensor}BLOCK, True)
    else:
        update({addresses}, coefficients + copy, copies, left, noise, {tensor}BLOCK, False)
"""


_OF_TENSOR = """\
first = tl.load(row).to(tl.int32)
last = first + tl.cdiv(size, BLOCK).to(tl.int32)
plane = copies.to(tl.int64) * blocks
sums += copy * blocks"""


def triton_source(
    program: Program, dtypes: Dtypes, stochastic_rounding: bool = False, launch: int | None = None
) -> str:
    """The module whose kernel ``step`` runs ``program`` on tensors of ``dtypes``.

    ``launch``: up to its reductions that wait for so many others, or to the end.
    """
    compute = "tl.float64" if dtypes[0] == torch.float64 else "tl.float32"
    columns = [dtypes[min(k, 2)] for k in range(len(program.tensors))]
    old = [(f"old{k}", dtype) for k, dtype in enumerate(columns)]
    new = [(f"new{k}", dtype) for k, dtype in enumerate(columns) if k != 1]
    names = identifiers(program)
    lines, values = statements(program, compute, launch)
    loads = [
        f"{names[name]} = tl.load(coefficients + {k} * copies).to({compute})"
        for k, name in enumerate(program.coefficients)
    ] + [
        f"{names[name]} = tl.load({address} + lanes, inside).to({compute})"
        for name, (address, _) in zip(program.tensors, old, strict=True)
    ]
    stored = [rounded(value, dtype) for value, (_, dtype) in zip(values, new, strict=True)]
    if stochastic_rounding:
        stored[0] = f"stochastic_bfloat16({values[0]}, noise)"
    stores = [
        f"tl.store({address} + lanes, tl.broadcast_to({value}, lanes.shape), inside)"
        for value, (address, _) in zip(stored, new, strict=True)
    ]
    if launch is not None:
        stores, stochastic_rounding = [], False
    reduces = program.reach != "element"
    everywhere = [address for address, _ in (*old, *new)]
    typed = list(enumerate((*old, *new), start=2))
    return _MODULE.format(
        imports=IMPORTS,
        addresses=", ".join(everywhere),
        tensor="sums, plane, block, first, last, size, " if reduces else "",
        sums="sums, " if reduces else "",
        reductions=indented(_OF_TENSOR.splitlines() if reduces else []),
        union=" | ".join(everywhere),
        lookups=indented(f"{a} = tl.load(row + {k} * count) + {dtype.itemsize} * offset" for k, (a, dtype) in typed),
        pointers=indented(f"{a} = {a}.to(tl.pointer_type({TYPES[dtype]}))" for _, (a, dtype) in typed),
        aligned=indented((f"{a} = tl.multiple_of({a}, 16)" for a in everywhere), depth=2),
        loads=indented(loads),
        statements=indented(lines),
        stores=indented(stores),
        noise="noise16(seed, program.to(tl.int64), BLOCK)" if stochastic_rounding else "None",
    )


# -- running -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def elementwise(program: Program, dtypes: Dtypes, stochastic_rounding: bool = False) -> TritonStep | None:
    """The step of ``program`` for tensors of these dtypes, or None for dtypes that it does not store, for matrix operations and
    for reductions of trees.

    Arithmetic is in float64 if parameters are, otherwise in float32; coefficients are rounded to that.

    Args:
        program: what to run.
        dtypes: of parameters, gradients and slots: float32, float64, bfloat16 or float16.
        stochastic_rounding: round bfloat16 parameters to one of their two neighbours at random, so that small moves count in
            expectation.

    Raises:
        ValueError: stochastic rounding of parameters that are not bfloat16.
        OSError: the cache directory cannot be written.
    """
    if stochastic_rounding and dtypes[0] != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 parameters, got {dtypes[0]}; leave it off for others")
    if any(dtype not in TYPES for dtype in dtypes) or program.reach in ("matrix", "tree"):
        return None
    launches = [*range(max(reduction_depths(program.kernel).values(), default=0)), None]
    sources = [triton_source(program, dtypes, stochastic_rounding, launch) for launch in launches]
    *reducing, kernel = [load_module(source, "elementwise").step for source in sources]
    return TritonStep(program, dtypes, kernel, stochastic_rounding, reducing)


class TritonStep:
    """One step of a program over many tensors of one GPU, in place or of stacked copies.

    Attributes:
        program: what it runs.
        dtypes: of parameters, gradients and slots.
        kernel: the generated ``step``.
        reducing: the launches before.
        stochastic_rounding: whether new bfloat16 parameters are rounded so; every call then needs a seed.
    """

    def __init__(
        self, program: Program, dtypes: Dtypes, kernel: Any, stochastic_rounding: bool, reducing: Sequence[Any] = ()
    ) -> None:
        self.program = program
        self.dtypes = dtypes
        self.stochastic_rounding = stochastic_rounding
        self.kernel = kernel
        self.reducing = reducing

    def fits(self, columns: Columns) -> bool:
        """Whether the step may run on ``columns``: all on one GPU, in its dtypes and flat (`are_flat`)."""
        devices = {tensor.device for tensor in chain.from_iterable(columns)}
        return len(devices) == 1 and devices.pop().type == DEVICE and are_flat(columns, self.dtypes)

    def __call__(self, columns: Columns, coefficients: Mapping[str, float], seed: int | None = None) -> None:
        """Update parameters and slots in place.

        Args:
            columns: per name in ``program.tensors``, a list of tensors that fit: their addresses are taken as they are.
            coefficients: per name in ``program.coefficients``, a float or a float64 tensor [1].
            seed: of stochastic rounding; another one in every step, or the same elements are rounded up again and again.

        Raises:
            ValueError: stochastic rounding without a seed.
        """
        self._launch(columns, [column for k, column in enumerate(columns) if k != 1], 1, coefficients, seed)
        # autograd must notice, as it does after torch's own steps, if a graph still holds the old parameter
        torch.autograd.graph.increment_version(columns[0])

    def copies(
        self, columns: Columns, coefficients: Mapping[str, float | Tensor], seed: int | None = None
    ) -> list[list[Tensor]]:
        """New parameters and slots of contiguous tensors [K, ...], each copy with coefficients of its own.

        Args:
            columns: per name in ``program.tensors``, contiguous tensors [K, ...] without a graph.
            coefficients: per name in ``program.coefficients``, a float or a float64 tensor [K].
            seed: as in a call.

        Raises:
            ValueError: stochastic rounding without a seed.
        """
        new = [[torch.empty_like(tensor) for tensor in column] for k, column in enumerate(columns) if k != 1]
        self._launch(columns, new, len(columns[0][0]), coefficients, seed)
        return new

    def _launch(
        self, old: Columns, new: Columns, copies: int, coefficients: Mapping[str, float | Tensor], seed: int | None
    ) -> None:
        if self.stochastic_rounding and seed is None:
            raise ValueError(
                "stochastic rounding needs a seed, got None; give another one in every step, such as its number"
            )
        sizes = tuple(tensor.numel() // copies for tensor in old[0])
        firsts = (0, *accumulate(triton.cdiv(size, BLOCK) for size in sizes))
        blocks, device = firsts[-1], old[0][0].device
        if blocks == 0:
            return
        with torch.cuda.device_of(old[0][0]):
            where = table((*firsts[:-1], *sizes, *map(Tensor.data_ptr, chain(*old, *new))), device)
            numbers = self._coefficients(coefficients, copies, device)
            sums = (
                [numbers.new_empty(sum(s.op in REDUCTIONS for s in self.program.kernel) * copies * blocks)]
                if self.reducing
                else []
            )
            for kernel in (*self.reducing, self.kernel):
                kernel[(blocks * copies,)](
                    where, numbers, *sums, seed or 0, len(sizes), copies, blocks,
                    COUNT=triton.next_power_of_2(len(sizes)), BLOCK=BLOCK, **_OPTIONS,
                )  # fmt: skip

    def _coefficients(self, values: Mapping[str, float | Tensor], copies: int, device: torch.device) -> Tensor:
        """Float64 [C, copies]."""
        given = [values[name] for name in self.program.coefficients]
        numbers = on_device([n for n in given if not isinstance(n, Tensor)], torch.float64, device)
        if not given or (copies == 1 and len(numbers) == len(given)):
            return numbers
        rest = iter(numbers)
        return torch.stack([(n if isinstance(n, Tensor) else next(rest)).expand(copies) for n in given])


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """Kernels of common rules; one kernel serves steps in place and of stacked copies."""
    single, half = torch.float32, torch.bfloat16
    chosen: list[tuple[str, str, Dtypes, bool]] = [
        ("adamw.float32", "adamw", (single, single, single), False),
        ("adamw.bfloat16", "adamw", (half, half, single), False),
        ("lion.stochastic_bfloat16", "lion", (half, half, half), True),
        ("lamb.float32", "lamb", (single, single, single), False),
    ]
    numbers = {"seed": "i64", "count": "i32", "copies": "i32", "blocks": "i32"}
    options = {key: value for key, value in _OPTIONS.items() if key != "num_warps"}
    cases = []
    for name, rule, dtypes, stochastic in chosen:
        step = elementwise(registry.create("optimizer", rule).program, dtypes, stochastic)
        assert step is not None
        pointers = {"table": "*i64", "coefficients": "*fp64"} | ({"sums": "*fp64"} if step.reducing else {})
        kernels = {f"{name}.sums": kernel for kernel in step.reducing} | {name: step.kernel}
        cases += [
            AotCase(
                f"elementwise.{key}", kernel, pointers | numbers, {"COUNT": 256, "BLOCK": BLOCK}, 4, tuple(pointers), options
            )
            for key, kernel in kernels.items()
        ]  # fmt: skip
    return cases
