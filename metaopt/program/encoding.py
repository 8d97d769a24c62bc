"""Programs as tables of integers: what the machines of `metaopt.program.population` run.

An instruction is

    opcode | target register | first operand | second operand | third operand

A register holds one value per element of a run's row, also those that are the same in all of a tensor. An operand k >= 0 is
register k, and k < 0 is number ``~k`` of the run: its coefficients, then the literals of its program. Reductions come as early
as they can and together, for a machine has to pass through all elements before it knows their results.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaopt.program.ops import MATRIX_OPS, OPS, REDUCTIONS
from metaopt.program.program import Arg, Statement, reduction_depths

OPERATIONS = (
    *sorted(OPS, key=lambda name: OPS[name].arity),
    *sorted(REDUCTIONS, key=lambda name: REDUCTIONS[name].over),
    *MATRIX_OPS,
)
"""What each opcode does. One operand to three, reductions of tensors and of trees, matrix operations: comparisons tell them
apart."""

FIRST_MATRIX_OP = len(OPS) + len(REDUCTIONS)
"""The lowest opcode of a matrix operation."""

_OPCODES = {name: k for k, name in enumerate(OPERATIONS)}


@dataclass(frozen=True)
class Code:
    """N encoded programs over the same inputs, padded with zeros.

    Attributes:
        instructions: int32 [N, L, 5].
        lengths: int32 [N], how many of the L instructions each program has.
        outputs: int32 [N, O], an operand each.
        counts: int32 [N], how many of the O outputs each program has.
        literals: float64 [N, K], the last of a run's numbers.
        inputs: how many registers hold an input at the start: the first ones.
        registers: how many there must be; the same register serves values that are not needed at the same time.
    """

    instructions: Tensor
    lengths: Tensor
    outputs: Tensor
    counts: Tensor
    literals: Tensor
    inputs: int
    registers: int


def reads_matrices(code: Code, runs: Tensor) -> Tensor:
    """Whether each run's program has matrix operations, bool [R] on the device of ``runs``."""
    return (code.instructions[..., 0] >= FIRST_MATRIX_OP).any(1).to(runs.device)[runs]


def require_programs(code: Code, runs: Tensor) -> None:
    """Raises ValueError unless ``runs`` are int64 [R] numbers of programs of ``code``."""
    count = len(code.lengths)
    if runs.dtype != torch.int64 or runs.dim() != 1 or bool(((runs < 0) | (runs >= count)).any()):
        raise ValueError(
            f"runs must be int64 [R], numbers of programs in [0, {count}), got {runs.dtype} {list(runs.shape)}"
            + (f" from {int(runs.min())} to {int(runs.max())}" if runs.numel() else "")
        )


class Listing(NamedTuple):
    """One encoded program."""

    instructions: list[int]
    """Five of each."""
    outputs: list[int]
    literals: list[float]
    registers: int


def assemble(
    statements: Sequence[Statement],
    inputs: Sequence[str],
    coefficients: Sequence[str],
    outputs: Sequence[Arg],
    first_literal: int,
) -> Listing:
    """Encode statements from ``inputs`` to ``outputs``.

    Args:
        statements: in single assignment.
        inputs: the names in the first registers.
        coefficients: the names of the first numbers.
        outputs: names or numbers.
        first_literal: where literals begin among the numbers.
    """
    statements = _reductions_together([part for s in statements for part in _spelled_out(s)])
    last_use: dict[Arg, int] = {arg: k for k, s in enumerate(statements) for arg in s.args}
    last_use.update(dict.fromkeys(outputs, len(statements)))
    registers: dict[Arg, int] = {name: k for k, name in enumerate(inputs)}
    free = [k for name, k in registers.items() if name not in last_use]
    used = len(inputs)
    numbers = {name: k for k, name in enumerate(coefficients)}
    literals: dict[str, float] = {}
    places: dict[str, int] = {}

    def operand(arg: Arg) -> int:
        if isinstance(arg, str):
            register = registers.get(arg)
            return ~numbers[arg] if register is None else register
        key = arg.hex()  # 0.0 == -0.0, and nan != nan
        if key not in places:
            literals[key], places[key] = arg, ~(first_literal + len(places))
        return places[key]

    instructions: list[int] = []
    for k, s in enumerate(statements):
        operands = [operand(arg) for arg in s.args]
        for dying in {arg for arg in s.args if last_use[arg] == k and arg in registers}:
            heapq.heappush(free, registers[dying])
        if not free:
            free, used = [used], used + 1
        registers[s.target] = heapq.heappop(free)
        instructions += (_OPCODES[s.op], registers[s.target], *operands, *[0] * (3 - len(operands)))
    return Listing(instructions, [operand(out) for out in outputs], list(literals.values()), used)


_POWERS: dict[Arg, tuple[tuple[str, tuple[Arg, ...]], ...]] = {
    0.5: (("sqrt", ("base",)),),
    1.0: (("mul", ("base", 1.0)),),
    2.0: (("mul", ("base", "base")),),
    3.0: (("mul", ("base", "base")), ("mul", ("last", "base"))),
    -0.5: (("sqrt", ("base",)), ("div", (1.0, "last"))),
    -1.0: (("div", (1.0, "base")),),
    -2.0: (("mul", ("base", "base")), ("div", (1.0, "last"))),
}
"""The exponents that torch does not hand to ``pow`` either: of -inf, ``pow`` to the 0.5 is inf, and the root is NaN."""


def _spelled_out(s: Statement) -> list[Statement]:
    if s.op != "pow" or s.args[1] not in _POWERS:
        return [s]
    parts = _POWERS[s.args[1]]
    targets = [*(f"{s.target}'{k}" for k in range(len(parts) - 1)), s.target]  # no identifiers, so that none is taken
    names: dict[Arg, Arg] = {"base": s.args[0]}
    made = []
    for target, (op, args) in zip(targets, parts, strict=True):
        made.append(Statement(target, op, tuple(names.get(arg, arg) for arg in args)))
        names["last"] = target
    return made


def _reductions_together(statements: list[Statement]) -> list[Statement]:
    """In the fewest stretches between reductions."""
    if not any(s.op in REDUCTIONS for s in statements):
        return statements
    depths = reduction_depths(statements)
    return sorted(statements, key=lambda s: (depths[s.target] - 1, 1) if s.op in REDUCTIONS else (depths[s.target], 0))


def stack(listings: Sequence[Listing], inputs: int) -> Code:
    """One `Code` of several programs over as many ``inputs`` at most."""

    def padded(rows: Sequence[Sequence[float]], dtype: type) -> Tensor:
        table: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype)
        for to, row in zip(table, rows, strict=True):
            to[: len(row)] = row
        return torch.from_numpy(table)

    instructions = padded([it.instructions for it in listings], np.int32)
    return Code(
        instructions.view(len(listings), -1, 5) if instructions.numel() else instructions[..., None].expand(-1, 0, 5),
        torch.tensor([len(it.instructions) // 5 for it in listings], dtype=torch.int32),
        padded([it.outputs for it in listings], np.int32),
        torch.tensor([len(it.outputs) for it in listings], dtype=torch.int32),
        padded([it.literals for it in listings], np.float64),
        inputs,
        max(inputs, *(it.registers for it in listings)),
    )
