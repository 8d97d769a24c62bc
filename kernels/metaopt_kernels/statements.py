"""A program's elementwise statements as the text of a Triton kernel."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch

from metaopt.program.cpp import identifiers
from metaopt.program.ops import COMPARISONS, OPS, REDUCTIONS
from metaopt.program.program import Arg, Program, Statement, reduction_depths

IMPORTS = """\
import triton
import triton.language as tl
from metaopt_kernels.arithmetic import *
"""
"""What a module with such statements begins with."""

TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
"""The dtypes that generated kernels store."""

_POWERS: dict[Arg, str] = {
    0.5: "square_root({0})", 1.0: "{0}", 2.0: "({0} * {0})", 3.0: "({0} * {0} * {0})",
    -0.5: "divide({1}, square_root({0}))", -1.0: "divide({1}, {0})", -2.0: "divide({1}, {0} * {0})",
}  # fmt: skip
"""The exponents that torch does not hand to ``pow`` either; {1} is the number 1."""


def statements(program: Program, dtype: str, launch: int | None = None) -> tuple[list[str], list[str]]:
    """The kernel of ``program``, to be put where its inputs are known.

    Reductions, of which number j of the program has its sums over blocks at ``sums + j * plane``, are those of the blocks
    from ``first`` to ``last`` of a tensor of ``size`` elements.

    Args:
        program: what to compute.
        dtype: of the arithmetic: ``"tl.float32"`` or ``"tl.float64"``.
        launch: only what the reductions that wait for so many others need, and their sums over block ``block``, of which
            ``left`` elements are in the tensor. Default: what the outputs need, where all sums are known.

    Returns:
        The lines, and an expression per output: blocks of that dtype; scalars where an output is a coefficient or a number.
        They read the tensors and coefficients of the program under the names of `identifiers`, in that dtype.
    """
    names = identifiers(program)
    truths = {s.target for s in program.kernel if s.op in COMPARISONS}
    depths = reduction_depths(program.kernel)
    reductions = [s for s in program.kernel if s.op in REDUCTIONS]
    summed = [s for s in reductions if launch is not None and depths[s.target] == launch + 1]
    wanted: set[Arg] = {arg for s in summed for arg in s.args} if summed else {*program.outputs}
    kept = []
    for s in reversed(program.kernel):
        if s.target in wanted:
            kept.append(s)
            wanted |= set() if s.op in REDUCTIONS else {*s.args}
    lines = []
    for s in reversed(kept):
        if s.op in REDUCTIONS:
            total = f"added_up(sums + {reductions.index(s)} * plane, first, last).to({dtype})"
            number = REDUCTIONS[s.op].triton.format(total, f"size.to({dtype})")
            lines.append(f"{names[s.target]} = tl.broadcast_to({number}, lanes.shape)")
        else:
            lines.append(f"{names[s.target]} = {_expression(s, names, truths, dtype)}")
    for s in summed:
        part = REDUCTIONS[s.op].generated_part.format(_number(s.args[0], names, truths, dtype))
        part = f"tl.where(lanes < left, {part}, 0.0).to(tl.float64)"
        lines.append(f"tl.store(sums + {reductions.index(s)} * plane + block, tl.sum({part}))")
    return lines, [_number(out, names, truths, dtype) for out in program.outputs]


def rounded(value: str, dtype: torch.dtype) -> str:
    """``value`` as it is stored in ``dtype``."""
    if dtype == torch.bfloat16:
        return f"nearest_bfloat16({value}.to(tl.float32))"
    return f"{value}.to({TYPES[dtype]})"


def indented(lines: Iterable[str], depth: int = 1) -> str:
    """``lines`` for a place in a template that stands ``depth`` indentations deep itself."""
    return ("\n" + "    " * depth).join(lines)


def _expression(s: Statement, names: Mapping[Arg, str], truths: Collection[Arg], dtype: str) -> str:
    numbers = [_number(arg, names, truths, dtype) for arg in s.args]
    if s.op == "where":
        condition = s.args[0]
        numbers[0] = names[condition] if condition in truths else f"({numbers[0]} != 0.0)"
    elif s.op == "pow" and s.args[1] in _POWERS:
        return _POWERS[s.args[1]].format(numbers[0], _number(1.0, names, truths, dtype))
    return OPS[s.op].triton.format(*numbers)


def _number(arg: Arg, names: Mapping[Arg, str], truths: Collection[Arg], dtype: str) -> str:
    """A comparison is 1 or 0 where a number is asked for."""
    if isinstance(arg, str):
        return f"{names[arg]}.to({dtype})" if arg in truths else names[arg]
    literal = repr(arg) if math.isfinite(arg) else f'float("{arg}")'
    return f"tl.full((), {literal}, {dtype})"  # by itself Triton takes a float for float32 wherever it fits
