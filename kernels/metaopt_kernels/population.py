"""One step of runs of hundreds of different programs in one launch: the register machine of `metaopt.program.population`.

    a program of the launch:   one block of elements of one run
    its registers:             param | grad | slots | temporaries    each a block of values

Reductions cut a step into as many more launches as wait for one another. A launch runs the code up to the next reductions, from
the beginning, and leaves their sums over each block; the following ones add these up, in one order. Blocks then end
with tensors.

It runs through the code of the run's program. All its threads take the same branches, so that an instruction costs a few
compares on the way to its operands, operation and target, and moves of blocks; not a computation of every operation and a
choice among all registers. The machine's text is generated for a number of slots and of registers, with one variable per
register, which the compiler can keep in the processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from metaopt.program.encoding import FIRST_MATRIX_OP, OPERATIONS, Code, reads_matrices, require_programs
from metaopt.program.ops import COMPARISONS, OPS, REDUCTIONS
from metaopt.program.population import Population
from metaopt_kernels.aot import AotCase
from metaopt_kernels.source import load_module
from metaopt_kernels.statements import IMPORTS, indented
from metaopt_kernels.tables import DEVICE, table

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


@triton.jit(do_not_specialize=[{unspecialised}])
def step(
    instructions, lengths, outputs, counts, runs, params, grads, slots, numbers,
    size, count, blocks, length, width, {more}BLOCK: tl.constexpr,
):
    run, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    program = tl.load(runs + run)
    {block}
    params += run * size
    grads += run * size
    slots += run * size
    numbers += run * width
    plane = count.to(tl.int64) * size
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

_BLOCK_OF_ROW = """\
lanes = block * BLOCK + tl.arange(0, BLOCK)
inside = lanes < size
written = inside"""

_BLOCK_OF_TENSOR = """\
tensors = tl.arange(0, TENSORS)
row = table + tl.sum((tl.load(table + tensors, tensors < many, blocks) <= block).to(tl.int32)) - 1
first, extent = tl.load(row).to(tl.int32), tl.load(row + many).to(tl.int32)
last = first + tl.cdiv(extent, BLOCK)
in_tensor = (block - first) * BLOCK + tl.arange(0, BLOCK)
lanes = tl.load(row + 2 * many).to(tl.int32) + in_tensor
inside = in_tensor < extent
written = in_tensor < extent * tl.load(finishes + program)
sums += run * most * blocks"""


def triton_source(slots: int, registers: int, reductions: bool = False) -> str:
    """The module whose kernel ``step`` is a machine with so many registers for programs of at most so many slots.

    Without ``reductions`` it knows none, and needs nothing but the tensors.
    """
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
    stores = [f"tl.store(params + lanes, {ends[0]}, written)"]
    for k, end in enumerate(ends[1:]):
        stores += [f"if {k} < present:", f"    tl.store(slots + {k} * plane + lanes, {end}, written)"]
    arguments_of_launches = ["count", "blocks", "length", "width"]
    more = ""
    if reductions:
        compute = [f"if opcode < {len(OPS)}:", *_deeper(compute), "else:", *_deeper(_reduction())]
        arguments_of_launches += ["now", "many", "most"]
        more = "table, finishes, sums, now, many, most, TENSORS: tl.constexpr, "
    return _MODULE.format(
        imports=IMPORTS,
        unspecialised=", ".join(f'"{name}"' for name in arguments_of_launches),
        more=more,
        block=indented((_BLOCK_OF_TENSOR if reductions else _BLOCK_OF_ROW).splitlines()),
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


def _reduction() -> list[str]:
    """The sum of a over the block in the launch that ends with it, and the number that it gives in later ones."""
    names = OPERATIONS[len(OPS) : FIRST_MATRIX_OP]
    parts = [[f"part = {REDUCTIONS[name].generated_part.format('a')}"] for name in names]
    finishes = [[f"number = {REDUCTIONS[name].triton.format('total', 'elements')}"] for name in names]
    first_of_trees = next(
        k for k, name in enumerate(OPERATIONS) if name in REDUCTIONS and REDUCTIONS[name].over == "tree"
    )
    return [
        "own = sums + tl.load(at + 3) * blocks",
        "if tl.load(at + 4) == now:", *_deeper([
            *_branches("opcode", parts, len(OPS)),
            "tl.store(own + block, tl.sum(tl.where(inside, part, 0.0).to(tl.float64)))",
            "x = a",
        ]),
        "else:", *_deeper([
            f"tree = opcode >= {first_of_trees}",
            "total = added_up(own, tl.where(tree, 0, first), tl.where(tree, blocks, last)).to(a.dtype)",
            "elements = tl.where(tree, size, extent).to(a.dtype)",
            *_branches("opcode", finishes, len(OPS)),
            "x = tl.broadcast_to(number, r0.shape)",
        ]),
    ]  # fmt: skip


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
    """`metaopt.program.population.PopulationStep` on the GPU that ``runs`` is on: one launch, and more for reductions.

    Attributes:
        population: the programs.
        runs: int64 [R], the program of each run.
        sizes: the elements of the tensors that lie side by side in each run's row; None for one tensor.

    Raises:
        ValueError: runs on no GPU, or of programs that it lacks or that have matrix operations.
    """

    def __init__(self, population: Population, runs: Tensor, sizes: Sequence[int] | None = None) -> None:
        code = population.kernel
        if runs.device.type != DEVICE:
            raise ValueError(f"runs must be on a {DEVICE} device, got {runs.device}; move them there")
        require_programs(code, runs)
        if reads_matrices(code, runs).any():
            raise ValueError("this machine has no matrix operations; step such programs by PopulationStep")
        self.population = population
        self.runs = runs.contiguous()
        self.sizes = None if sizes is None else tuple(map(int, sizes))
        instructions, self._most, launches = _cut(code)
        self._code = [it.to(runs.device) for it in (instructions, code.outputs, code.counts)]
        self._launches = [(lengths.to(runs.device), finishes.to(runs.device)) for lengths, finishes in launches]
        self._kernel = _kernel(code.inputs - 2, code.registers, self._most > 0)

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
        if params.numel() == 0:
            return
        sizes = (size,) if self.sizes is None or not self._most else self.sizes
        firsts = (0, *accumulate(triton.cdiv(extent, BLOCK) for extent in sizes))
        blocks = firsts[-1]
        instructions, outputs, counts = self._code
        with torch.cuda.device_of(params):
            more: dict[str, Any] = {}
            if self._most:
                more = {
                    "table": table((*firsts[:-1], *sizes, *accumulate(sizes[:-1], initial=0)), params.device),
                    "sums": params.new_empty(count * self._most * blocks, dtype=torch.float64),
                    "many": len(sizes),
                    "most": self._most,
                    "TENSORS": triton.next_power_of_2(len(sizes)),
                }
            for now, (lengths, finishes) in enumerate(self._launches):
                if self._most:
                    more |= {"now": now, "finishes": finishes}
                self._kernel[(blocks * count,)](
                    instructions, lengths, outputs, counts, self.runs, *tensors.values(), size, count, blocks,
                    instructions.shape[1], numbers.shape[1], **more, BLOCK=BLOCK, **_OPTIONS,
                )  # fmt: skip


def _cut(code: Code) -> tuple[Tensor, int, list[tuple[Tensor, Tensor]]]:
    """How programs are cut at their reductions, of which those that stand together end a launch together.

    Returns:
        Instructions in which a reduction's unused operands are its number among those of its program, and that of the launch
        that ends with it; the most reductions of a program; and for each launch int32 [N]: how many instructions of each
        program it runs, and whether the program is through with it.
    """
    inside = torch.arange(code.instructions.shape[1]) < code.lengths[:, None]
    reduces = (code.instructions[..., 0] >= len(OPS)) & inside
    begins = reduces.clone()
    begins[:, 1:] &= ~reduces[:, :-1]
    begun = begins.cumsum(1)
    instructions = code.instructions.clone()
    instructions[..., 3] = torch.where(reduces, reduces.cumsum(1) - 1, instructions[..., 3]).int()
    instructions[..., 4] = torch.where(reduces, begun - 1, instructions[..., 4]).int()
    cuts = begins.sum(1)
    launches = []
    for k in range(int(cuts.max()) + 1):
        taken = inside & (cuts[:, None] >= k) & (begun - reduces.int() <= k)
        launches.append((taken.sum(1).int(), (cuts == k).int()))
    return instructions, int(reduces.sum(1).max()), launches


def _kernel(slots: int, registers: int, reductions: bool) -> Any:
    """The machine's kernel; multiples of 4 registers keep a search from compiling one for each of its generations."""
    return load_module(triton_source(slots, max(4, -(-registers // 4) * 4), reductions), "population").step


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """Machines for programs that have AdamW's slots: the size that rules need, and room for what search makes of them."""
    pointers = {name: "*i32" for name in ("instructions", "lengths", "outputs", "counts")}
    tensors = {name: "*fp32" for name in ("params", "grads", "slots", "numbers")}
    numbers = {name: "i32" for name in ("size", "count", "blocks", "length", "width")}
    signature = {**pointers, "runs": "*i64", **tensors, **numbers}
    aligned = (*pointers, "runs", *tensors, "size")
    sums = {"table": "*i64", "finishes": "*i32", "sums": "*fp64"}
    options = {key: value for key, value in _OPTIONS.items() if key != "num_warps"}
    cases = []
    for registers in (8, 16):
        plain, reducing = (_kernel(2, registers, reductions) for reductions in (False, True))
        name = f"{registers}_registers"
        cases += [
            AotCase(f"population.{name}", plain, signature, {"BLOCK": BLOCK}, 4, aligned, options),
            AotCase(
                f"population.reductions.{name}",
                reducing,
                {**signature, **sums, "now": "i32", "many": "i32", "most": "i32"},
                {"BLOCK": BLOCK, "TENSORS": 8},
                4,
                (*aligned, *sums),
                options,
            ),
        ]
    return cases
