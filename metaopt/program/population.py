"""Programs as tables of integers, so that one machine steps runs of hundreds of different programs at once.

Search evaluates programs faster than any of them could be compiled. So programs are encoded, for a register machine:

    opcode | target register | first operand | second operand | third operand

A register holds one value per element of a run's tensors. An operand k >= 0 is register k, and k < 0 is number ``~k`` of the
run: its coefficients, which its program's `Program.prelude` computes from its own hyperparameters, then the literals of its
program. The prelude is encoded likewise, with one element per step of a window, and run in float64.

Here the machine is torch operations, each over all runs that want it next; `metaopt_kernels.population` is the same machine
as one launch. Both compute what `evaluate` computes. The language has no reductions over a tensor; a machine that had them
would have to cut programs at each, and run the parts as phases.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.program.ops import OPS
from metaopt.program.program import Arg, Program, Statement
from metaopt.program.trace import without_dead

OPERATIONS = tuple(sorted(OPS, key=lambda name: OPS[name].arity))
"""What each opcode does: from one operand to three, so that a comparison tells how many an instruction has."""

# -- encoding ----------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Population:
    """Encoded programs, on the CPU.

    Attributes:
        scalars: the names that some of the programs read, in the order of the prelude's inputs.
        prelude: from scalars to coefficients.
        kernel: from parameter, gradient and slots to new parameter and slots. Programs with fewer slots than others have
            the first ones, in their own order.
    """

    scalars: tuple[str, ...]
    prelude: Code
    kernel: Code

    def numbers(
        self, runs: Tensor, scalars: Mapping[str, float | Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """What the runs' kernels read beside tensors in each of T steps.

        Args:
            runs: int64 [R], the program of each run.
            scalars: per name in ``scalars`` a float, or a tensor that broadcasts to [R, T]. ``t`` counts from 1.
            dtype: of the runs' tensors; numbers are computed in float64 and then rounded to it.

        Returns:
            [T, R, M] on the device of ``runs``.

        Raises:
            ValueError: a name without a value, or a tensor that is not of two dimensions.
        """
        require_programs(self.kernel, runs)
        values = []
        for name in self.scalars:
            if name not in scalars:
                raise ValueError(f"scalars lack {name!r}, which programs read; give {', '.join(self.scalars)}")
            value = torch.as_tensor(scalars[name], dtype=torch.float64, device=runs.device)
            if value.dim() not in (0, 2):
                raise ValueError(
                    f"{name} must be a float or a tensor [runs, steps] (either may be 1), got shape {tuple(value.shape)}"
                )
            values.append(value)
        shape = torch.broadcast_shapes((len(runs), 1), *(value.shape for value in values))
        coefficients = runs.new_zeros((self.prelude.outputs.shape[1], *shape), dtype=torch.float64)
        literals = self.prelude.literals.to(runs.device)[runs]
        _Machine(self.prelude, runs)([value.expand(shape) for value in values], literals, [*coefficients])
        rest = self.kernel.literals.to(runs.device)[runs].expand(shape[1], -1, -1)
        return torch.cat([coefficients.permute(2, 1, 0), rest], dim=2).to(dtype)

    def check(self, runs: Tensor, params: Tensor, grads: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Refuse what a step of ``runs`` cannot take.

        Raises:
            ValueError: tensors of other shapes or dtypes than `PopulationStep` takes.
        """
        count, size = len(runs), params.shape[-1:].numel()
        shapes = {
            "params": (params, (count, size)),
            "grads": (grads, (count, size)),
            "slots": (slots, (self.kernel.inputs - 2, count, size)),
            "numbers": (numbers, (count, self.prelude.outputs.shape[1] + self.kernel.literals.shape[1])),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor.shape != shape or tensor.dtype != params.dtype or tensor.device != runs.device:
                raise ValueError(
                    f"{name} must be {list(shape)} of {params.dtype} on {runs.device}, "
                    f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
                )


def encode(programs: Sequence[Program]) -> Population:
    """Encode programs, without the statements that no output depends on.

    Args:
        programs: at least one; slots and scalars may differ.

    Raises:
        ValueError: no program.
    """
    if not programs:
        raise ValueError("a population needs at least one program, got none")
    live = [without_dead(program) for program in programs]
    read = [{*p.coefficients, *(arg for s in p.prelude for arg in s.args)} for p in live]
    scalars = tuple(
        dict.fromkeys(name for p, names in zip(live, read, strict=True) for name in p.scalars if name in names)
    )
    coefficients = max(len(p.coefficients) for p in live)
    preludes = [_assemble(p.prelude, scalars, (), p.coefficients, 0) for p in live]
    kernels = [_assemble(p.kernel, p.tensors, p.coefficients, p.outputs, coefficients) for p in live]
    return Population(scalars, _stack(preludes, len(scalars)), _stack(kernels, max(len(p.tensors) for p in live)))


class _Listing(NamedTuple):
    """One encoded program."""

    instructions: list[list[int]]
    outputs: list[int]
    literals: list[float]
    registers: int


def _assemble(
    statements: Sequence[Statement],
    inputs: Sequence[str],
    coefficients: Sequence[str],
    outputs: Sequence[Arg],
    first_literal: int,
) -> _Listing:
    statements = [part for s in statements for part in _spelled_out(s)]
    last_use: dict[Arg, int] = {arg: k for k, s in enumerate(statements) for arg in s.args}
    last_use.update(dict.fromkeys(outputs, len(statements)))
    registers: dict[Arg, int] = {name: k for k, name in enumerate(inputs)}
    free = [k for name, k in registers.items() if name not in last_use]
    used = len(inputs)
    numbers = {name: k for k, name in enumerate(coefficients)}
    literals: dict[str, float] = {}

    def operand(arg: Arg) -> int:
        if arg in registers:
            return registers[arg]
        if isinstance(arg, str):
            return ~numbers[arg]
        key = float(arg).hex()  # 0.0 == -0.0, and nan != nan
        literals.setdefault(key, arg)
        return ~(first_literal + list(literals).index(key))

    instructions = []
    for k, s in enumerate(statements):
        operands = [operand(arg) for arg in s.args]
        for dying in {arg for arg in s.args if arg in registers and last_use[arg] == k}:
            heapq.heappush(free, registers[dying])
        if not free:
            free, used = [used], used + 1
        registers[s.target] = heapq.heappop(free)
        operands += [0] * (3 - len(operands))
        instructions.append([OPERATIONS.index(s.op), registers[s.target], *operands])
    places = [operand(out) for out in outputs]
    return _Listing(instructions, places, list(literals.values()), used)


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


def _stack(listings: Sequence[_Listing], inputs: int) -> Code:
    def padded(rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int32)

    instructions = padded([[n for instruction in it.instructions for n in instruction] for it in listings])
    literals = torch.zeros(len(listings), max(len(it.literals) for it in listings), dtype=torch.float64)
    for row, it in zip(literals, listings, strict=True):
        row[: len(it.literals)] = torch.tensor(it.literals, dtype=torch.float64)
    return Code(
        instructions.unflatten(1, (-1, 5)) if instructions.numel() else instructions.new_empty(len(listings), 0, 5),
        torch.tensor([len(it.instructions) for it in listings], dtype=torch.int32),
        padded([it.outputs for it in listings]),
        torch.tensor([len(it.outputs) for it in listings], dtype=torch.int32),
        literals,
        inputs,
        max(inputs, *(it.registers for it in listings)),
    )


# -- running -----------------------------------------------------------------------------------------------------------


class PopulationStep:
    """One step of R runs of different programs, in torch operations.

    Attributes:
        population: the programs.
        runs: int64 [R], the program of each run.
    """

    def __init__(self, population: Population, runs: Tensor) -> None:
        self.population = population
        self.runs = runs
        self._machine = _Machine(population.kernel, runs)

    def __call__(self, params: Tensor, grads: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Update parameters and slots in place, outside autograd.

        Args:
            params: [R, P] of a floating dtype.
            grads: [R, P].
            slots: [S, R, P] where S is the most slots that a program has; what a run's program lacks is left alone.
            numbers: [R, M], one step of `Population.numbers`.

        Raises:
            ValueError: tensors of other shapes, dtypes or devices.
        """
        self.population.check(self.runs, params, grads, slots, numbers)
        self._machine([params, grads, *slots], numbers, [params, *slots])


class _Operand(NamedTuple):
    """An operand of some runs: in all of them a register, or in all a number."""

    runs: Tensor
    in_register: bool
    place: Tensor  # int64: rows of [registers * R, E], or columns of the numbers


class _Group(NamedTuple):
    """An operation that some runs execute together."""

    op: str
    operands: list[_Operand]
    target: Tensor  # int64: rows of [registers * R, E]


class _Machine:
    """R runs of `Code` in torch operations: at any time, the operation that most of them want next."""

    def __init__(self, code: Code, runs: Tensor) -> None:
        require_programs(code, runs)
        self._registers = code.registers
        self._count = len(runs)
        self._device = runs.device
        programs, everyone = runs.cpu(), torch.arange(len(runs))
        instructions, lengths = code.instructions[programs].long(), code.lengths[programs]
        operands = instructions[..., 2:]
        kinds = instructions[..., 0] * 8 + ((operands < 0) * torch.tensor([1, 2, 4])).sum(-1)
        at = torch.zeros_like(lengths)
        self._groups: list[_Group] = []
        while len(waiting := everyone[at < lengths]):
            kind = kinds[waiting, at[waiting]]
            chosen = waiting[kind == kind.mode().values]
            opcode, target, *columns = instructions[chosen, at[chosen]].T
            op = OPERATIONS[int(opcode[0])]
            arguments = [self._operand(column, chosen) for column in columns[: OPS[op].arity]]
            self._groups.append(_Group(op, arguments, self._row(target, chosen)))
            at[chosen] += 1
        self._outputs: list[list[_Operand]] = []
        for k, column in enumerate(code.outputs[programs].long().T):
            present = code.counts[programs] > k
            parts = [everyone[present & kind] for kind in (column >= 0, column < 0)]
            self._outputs.append([self._operand(column[part], part) for part in parts if len(part)])

    def _row(self, register: Tensor, runs: Tensor) -> Tensor:
        return (register * self._count + runs).to(self._device)

    def _operand(self, encoded: Tensor, runs: Tensor) -> _Operand:
        in_register = bool(encoded[0] >= 0)
        place = self._row(encoded, runs) if in_register else ~encoded.to(self._device)
        return _Operand(runs.to(self._device), in_register, place)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], numbers: Tensor, outputs: Sequence[Tensor]) -> None:
        """From inputs [R, E] to outputs [R, E], which may be the same tensors; numbers are [R, M]."""
        if not outputs:
            return
        width = outputs[0].shape[1]
        registers = outputs[0].new_empty(self._registers, self._count, width)
        for register, value in zip(registers[: len(inputs)], inputs, strict=True):
            register.copy_(value)
        rows = registers.flatten(0, 1)

        def values(operand: _Operand) -> Tensor:
            if operand.in_register:
                return rows.index_select(0, operand.place)
            return numbers[operand.runs, operand.place, None]

        for op, operands, target in self._groups:
            args = [values(operand) for operand in operands]
            if op == "where":
                args[0] = args[0] != 0
            result = OPS[op].plain(*args).to(rows.dtype)
            rows.index_copy_(0, target, result.expand(-1, width))
        for output, moves in zip(outputs, self._outputs, strict=True):
            for operand in moves:
                output.index_copy_(0, operand.runs, values(operand).expand(-1, width))


def require_programs(code: Code, runs: Tensor) -> None:
    """Raises ValueError unless ``runs`` are int64 [R] numbers of programs of ``code``."""
    count = len(code.lengths)
    if runs.dtype != torch.int64 or runs.dim() != 1 or bool(((runs < 0) | (runs >= count)).any()):
        raise ValueError(
            f"runs must be int64 [R], numbers of programs in [0, {count}), got {runs.dtype} {list(runs.shape)}"
            + (f" from {int(runs.min())} to {int(runs.max())}" if runs.numel() else "")
        )
