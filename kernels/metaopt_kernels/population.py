"""One step of runs of hundreds of different programs in one launch: the register machine of `metaopt.program.population`.

    a program of the launch:   one block of elements of one run
    its registers:             param | grad | slots | temporaries    each a block of values

It runs through the code of the run's program. All its threads take the same branches, so that an instruction costs a few
compares on the way to its operands, operation and target, and moves of blocks; not a computation of every operation and a
choice among all registers. The machine's text is generated for a number of slots and of registers, with one variable per
register, which the compiler can keep in the processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from metaopt.program.encoding import OPERATIONS, require_programs
from metaopt.program.inplace import COMPARISONS
from metaopt.program.ops import OPS
from metaopt.program.population import Population
from metaopt_kernels.aot import AotCase
from metaopt_kernels.source import load_module
from metaopt_kernels.statements import IMPORTS, indented
from metaopt_kernels.tables import DEVICE

BLOCK = 512
"""Elements of a block."""

_OPTIONS = {
    "num_warps": 4,
    "enable_fp_fusion": False,  # torch rounds after each operation
    "maxnreg": 168,  # of three blocks on a multiprocessor; left to itself, ptxas spills to fit in one more
}

# -- source ------------------------------------------------------------------------------------------------------------

_MODULE = """\
{imports}

@triton.jit
def operand(which, numbers, {registers}):
    if which < 0:
        value = tl.broadcast_to(tl.load(numbers - 1 - which), r0.shape)
    else:
        {read}
    return value


@triton.jit(do_not_specialize=["count", "blocks", "length", "width"])
def step(
    instructions, lengths, outputs, counts, runs, params, grads, slots, numbers,
    size, count, blocks, length, width, BLOCK: tl.constexpr,
):
    run, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < size
    params += run * size
    grads += run * size
    slots += run * size
    numbers += run * width
    plane = count.to(tl.int64) * size
    program = tl.load(runs + run)
    present = tl.load(counts + program) - 1
    {loads}
    at = instructions + program * (length * 5)
    for _ in range(tl.load(lengths + program)):
        opcode, target = tl.load(at), tl.load(at + 1)
        a = operand(tl.load(at + 2), numbers, {registers})
        {compute}
        {write}
        at += 5
    outputs += program * {outputs}
    {stores}
"""


def triton_source(slots: int, registers: int) -> str:
    """The module whose kernel ``step`` is a machine with so many registers for programs of at most so many slots."""
    names = [f"r{k}" for k in range(registers)]
    inputs = 2 + slots
    arguments = ", ".join(names)
    by_arity = [[op for op in OPERATIONS if op in OPS and OPS[op].arity == arity] for arity in (1, 2, 3)]
    unary, binary, ternary = (
        _branches("opcode", [[f"x = {_operation(op)}"] for op in ops], _first(ops)) for ops in by_arity
    )
    fetch = [f"{name} = operand(tl.load(at + {k}), numbers, {arguments})" for k, name in ((3, "b"), (4, "c"))]
    compute = [
        f"if opcode < {_first(by_arity[1])}:", *_deeper(unary),
        "else:", *_deeper([
            fetch[0],
            f"if opcode < {_first(by_arity[2])}:", *_deeper(binary),
            "else:", *_deeper([fetch[1], *ternary]),
        ]),
    ]  # fmt: skip
    loads = ["r0 = tl.load(params + lanes, inside, 0.0)", "r1 = tl.load(grads + lanes, inside, 0.0)"]
    loads += [f"{name} = tl.zeros_like(r0)" for name in names[2:]]
    for k, name in enumerate(names[2:inputs]):
        loads += [f"if {k} < present:", f"    {name} = tl.load(slots + {k} * plane + lanes, inside, 0.0)"]
    ends = [f"operand(tl.load(outputs + {k}), numbers, {arguments})" for k in range(1 + slots)]
    stores = [f"tl.store(params + lanes, {ends[0]}, inside)"]
    for k, end in enumerate(ends[1:]):
        stores += [f"if {k} < present:", f"    tl.store(slots + {k} * plane + lanes, {end}, inside)"]
    return _MODULE.format(
        imports=IMPORTS,
        registers=arguments,
        read=indented(_branches("which", [[f"value = {name}"] for name in names]), depth=2),
        write=indented(_branches("target", [[f"{name} = x"] for name in names]), depth=2),
        compute=indented(compute, depth=2),
        loads=indented(loads),
        stores=indented(stores),
        outputs=1 + slots,
    )


def _operation(op: str) -> str:
    """The text of an operation on the operands a, b and c."""
    text = OPS[op].triton.format("(a != 0.0)" if op == "where" else "a", "b", "c")
    return f"{text}.to(a.dtype)" if op in COMPARISONS else text


def _first(ops: Sequence[str]) -> int:
    """The lowest opcode among them."""
    return min(map(OPERATIONS.index, ops))


def _branches(number: str, leaves: Sequence[list[str]], first: int = 0) -> list[str]:
    """Lines that run leaf ``number - first``, found by halving."""
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return [
        f"if {number} < {first + half}:", *_deeper(_branches(number, leaves[:half], first)),
        "else:", *_deeper(_branches(number, leaves[half:], first + half)),
    ]  # fmt: skip


def _deeper(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


# -- running -----------------------------------------------------------------------------------------------------------


class TritonPopulationStep:
    """`metaopt.program.population.PopulationStep` in one launch, on the GPU that ``runs`` is on; without reductions.

    Attributes:
        population: the programs.
        runs: int64 [R], the program of each run.
        sizes: the elements of the tensors that lie side by side in each run's row; None for one tensor.
    """

    def __init__(self, population: Population, runs: Tensor, sizes: Sequence[int] | None = None) -> None:
        code = population.kernel
        if bool((code.instructions[..., 0] >= len(OPS)).any()):
            raise ValueError("this kernel runs programs without reductions; use PopulationStep")
        if runs.device.type != DEVICE:
            raise ValueError(f"runs must be on a {DEVICE} device, got {runs.device}; move them there")
        require_programs(code, runs)
        self.population = population
        self.sizes = None if sizes is None else tuple(map(int, sizes))
        self.runs = runs.contiguous()
        self._code = [it.to(runs.device) for it in (code.instructions, code.lengths, code.outputs, code.counts)]
        self._kernel = _kernel(code.inputs - 2, code.registers)

    def __call__(self, params: Tensor, grads: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Update parameters and slots in place, outside autograd.

        Args:
            params: float32 or float64 [R, P], contiguous like all others.
            grads: [R, P].
            slots: [S, R, P] where S is the most slots that a program has; what a run's program lacks is left alone.
            numbers: [R, M], one step of `Population.numbers`.

        Raises:
            ValueError: tensors of other shapes, dtypes, devices or layouts.
        """
        self.population.check(self.runs, self.sizes, params, grads, slots, numbers)
        tensors = {"params": params, "grads": grads, "slots": slots, "numbers": numbers}
        for name, tensor in tensors.items():
            if not tensor.is_contiguous() or tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} must be contiguous float32 or float64, got {tensor.dtype} {tensor.stride()}")
        count, size = params.shape
        blocks = triton.cdiv(size, BLOCK)
        if params.numel() == 0:
            return
        with torch.cuda.device_of(params):
            self._kernel[(blocks * count,)](
                *self._code, self.runs, *tensors.values(), size, count, blocks,
                self._code[0].shape[1], numbers.shape[1], BLOCK=BLOCK, **_OPTIONS,
            )  # fmt: skip


def _kernel(slots: int, registers: int) -> Any:
    """The machine's kernel; multiples of 4 registers keep a search from compiling one for each of its generations."""
    return load_module(triton_source(slots, max(4, -(-registers // 4) * 4)), "population").step


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """Machines for programs that have AdamW's slots: the size that rules need, and room for what search makes of them."""
    pointers = {name: "*i32" for name in ("instructions", "lengths", "outputs", "counts")}
    tensors = {name: "*fp32" for name in ("params", "grads", "slots", "numbers")}
    numbers = {name: "i32" for name in ("size", "count", "blocks", "length", "width")}
    signature = {**pointers, "runs": "*i64", **tensors, **numbers}
    options = {key: value for key, value in _OPTIONS.items() if key != "num_warps"}
    return [
        AotCase(
            f"population.{registers}_registers",
            _kernel(2, registers),
            signature,
            {"BLOCK": BLOCK},
            4,
            (*pointers, "runs", *tensors, "size"),
            options,
        )
        for registers in (8, 16)
    ]
