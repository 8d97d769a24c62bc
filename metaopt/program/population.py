"""Runs of hundreds of different programs that step at once.

Search evaluates programs faster than any of them could be compiled. So programs are encoded (`metaopt.program.encoding`), for a
register machine. The numbers of a run are its coefficients, which its program's `Program.prelude` computes from its own
hyperparameters, then the literals of its program. The prelude is encoded likewise, with one element per step of a window, and
run in float64.

The machine is C++ for tensors of a CPU (`metaopt.program.population_cpp`), else torch operations, each over all runs that want
it next, as always for programs with matrix operations; `metaopt_kernels.population` is the same machine as one launch. All
compute what `evaluate_tree` computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.program.encoding import OPERATIONS, Code, assemble, reads_matrices, require_programs, stack
from metaopt.program.ops import MATRIX_OPS, OPS, REDUCTIONS
from metaopt.program.population_cpp import CppMachine
from metaopt.program.program import Program
from metaopt.program.trace import without_dead


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

    def check(
        self, runs: Tensor, sizes: Sequence[int] | None, params: Tensor, grads: Tensor, slots: Tensor, numbers: Tensor
    ) -> None:
        """Refuse what a step of ``runs`` cannot take.

        Raises:
            ValueError: tensors of other shapes or dtypes than `PopulationStep` takes, or sizes of other tensors.
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
        if sizes is not None and (min(sizes, default=0) < 0 or sum(sizes) != size):
            raise ValueError(f"sizes must be those of tensors with {size} elements together, got {list(sizes)}")


def encode(programs: Sequence[Program]) -> Population:
    """Encode programs, without the statements that no output depends on.

    Args:
        programs: at least one; slots and scalars may differ.

    Raises:
        ValueError: no program.
        TypeError: something else among them.
    """
    if not programs:
        raise ValueError("a population needs at least one program, got none")
    for program in programs:
        if not isinstance(program, Program):
            raise TypeError(f"encode takes programs, got {program!r}; of an elementwise rule that is rule.program")
    live = [without_dead(program) for program in programs]
    read = [{*p.coefficients, *(arg for s in p.prelude for arg in s.args)} for p in live]
    scalars = tuple(
        dict.fromkeys(name for p, names in zip(live, read, strict=True) for name in p.scalars if name in names)
    )
    coefficients = max(len(p.coefficients) for p in live)
    preludes = [assemble(p.prelude, scalars, (), p.coefficients, 0) for p in live]
    kernels = [assemble(p.kernel, p.tensors, p.coefficients, p.outputs, coefficients) for p in live]
    return Population(scalars, stack(preludes, len(scalars)), stack(kernels, max(len(p.tensors) for p in live)))


# -- running -----------------------------------------------------------------------------------------------------------


class PopulationStep:
    """One step of R runs of different programs.

    Attributes:
        population: the programs.
        runs: int64 [R], the program of each run.
        sizes: the elements of the tensors that lie side by side in each run's row; None for one tensor.

    Args:
        sizes: of the tensors their elements or, for matrix operations, their shapes: an int is a vector's.
    """

    def __init__(
        self, population: Population, runs: Tensor, sizes: Sequence[int | Sequence[int]] | None = None
    ) -> None:
        require_programs(population.kernel, runs)
        self.population = population
        self.runs = runs
        shapes = None if sizes is None else [(size,) if isinstance(size, int) else tuple(size) for size in sizes]
        self.sizes = None if shapes is None else tuple(map(math.prod, shapes))
        of_matrices = reads_matrices(population.kernel, runs)
        mixed = bool(of_matrices.any()) and not bool(of_matrices.all())
        parts = [~of_matrices, of_matrices] if mixed else [torch.ones_like(of_matrices)]
        self._machines = [(part, _Machine(population.kernel, runs[part], shapes)) for part in parts]

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
        self.population.check(self.runs, self.sizes, params, grads, slots, numbers)
        if len(self._machines) == 1:
            self._machines[0][1]([params, grads, *slots], numbers, [params, *slots])
            return
        for part, machine in self._machines:
            own, *rest = (tensor[part] for tensor in (params, grads, *slots))
            machine([own, *rest], numbers[part], [own, *rest[1:]])
            for whole, new in zip((params, *slots), (own, *rest[1:]), strict=True):
                whole[part] = new


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
    """R runs of `Code`: in all of them or in none there are matrix operations."""

    def __init__(self, code: Code, runs: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> None:
        self._code = code
        self._runs = runs
        self._shapes = shapes
        self._sizes = None if shapes is None else [*map(math.prod, shapes)]
        in_cpp = runs.is_cpu and not bool(reads_matrices(code, runs).any())
        self._in_cpp = CppMachine(code, runs, self._sizes) if in_cpp else None

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], numbers: Tensor, outputs: Sequence[Tensor]) -> None:
        """From inputs [R, E] to outputs [R, E], which may be the same tensors; numbers are [R, M]."""
        if not outputs:
            return
        if self._in_cpp is None or not self._in_cpp(inputs, numbers, outputs):
            self._by_torch(inputs, numbers, outputs)

    def _by_torch(self, inputs: Sequence[Tensor], numbers: Tensor, outputs: Sequence[Tensor]) -> None:
        groups, results = self._plan
        width = outputs[0].shape[1]
        registers = outputs[0].new_empty(self._code.registers, len(self._runs), width)
        for register, value in zip(registers[: len(inputs)], inputs, strict=True):
            register.copy_(value)
        rows = registers.flatten(0, 1)

        def values(operand: _Operand) -> Tensor:
            if operand.in_register:
                return rows.index_select(0, operand.place)
            return numbers[operand.runs, operand.place, None]

        for op, operands, target in groups:
            args = [values(operand) for operand in operands]
            if op == "where":
                args[0] = args[0] != 0
            if op in REDUCTIONS:
                result = self._reduced(op, *args)
            elif op in MATRIX_OPS:
                result = self._of_matrices(op, *args)
            else:
                result = OPS[op].plain(*args).to(rows.dtype)
            rows.index_copy_(0, target, result.expand(-1, width))
        for output, moves in zip(outputs, results, strict=True):
            for operand in moves:
                output.index_copy_(0, operand.runs, values(operand).expand(-1, width))

    def _reduced(self, op: str, values: Tensor) -> Tensor:
        """In the place of each element, the number of its tensor or tree."""
        reduction = REDUCTIONS[op]
        whole = self._sizes is None or reduction.over == "tree"
        parts = reduction.part(values).split(values.shape[1] if whole else self._sizes, dim=1)
        numbers = [reduction.finish(part.sum(1, keepdim=True), part.shape[1]).expand_as(part) for part in parts]
        return torch.cat(numbers, dim=1)

    def _of_matrices(self, op: str, values: Tensor) -> Tensor:
        """A matrix operation on each tensor, of all runs at once."""
        shapes, sizes = self._shapes or [values.shape[1:]], self._sizes or [values.shape[1]]
        found = []
        for part, shape in zip(values.split(sizes, dim=1), shapes, strict=True):
            made = torch.vmap(MATRIX_OPS[op].plain)(part.reshape(len(part), *shape))
            found.append(made.reshape(len(part), -1).expand_as(part))
        return torch.cat(found, dim=1)

    @cached_property
    def _plan(self) -> tuple[list[_Group], list[list[_Operand]]]:
        """At any time, the operation that most runs want next; and the operands of each output."""
        code, programs, everyone = self._code, self._runs.cpu(), torch.arange(len(self._runs))
        instructions, lengths = code.instructions[programs].long(), code.lengths[programs]
        operands = instructions[..., 2:]
        kinds = instructions[..., 0] * 8 + ((operands < 0) * torch.tensor([1, 2, 4])).sum(-1)
        at = torch.zeros_like(lengths)
        groups: list[_Group] = []
        while len(waiting := everyone[at < lengths]):
            kind = kinds[waiting, at[waiting]]
            chosen = waiting[kind == kind.mode().values]
            opcode, target, *columns = instructions[chosen, at[chosen]].T
            op = OPERATIONS[int(opcode[0])]
            arity = OPS[op].arity if op in OPS else 1
            arguments = [self._operand(column, chosen) for column in columns[:arity]]
            groups.append(_Group(op, arguments, self._row(target, chosen)))
            at[chosen] += 1
        outputs: list[list[_Operand]] = []
        for k, column in enumerate(code.outputs[programs].long().T):
            present = code.counts[programs] > k
            parts = [everyone[present & kind] for kind in (column >= 0, column < 0)]
            outputs.append([self._operand(column[part], part) for part in parts if len(part)])
        return groups, outputs

    def _row(self, register: Tensor, runs: Tensor) -> Tensor:
        return (register * len(self._runs) + runs).to(self._runs.device)

    def _operand(self, encoded: Tensor, runs: Tensor) -> _Operand:
        in_register = bool(encoded[0] >= 0)
        place = self._row(encoded, runs) if in_register else ~encoded.to(self._runs.device)
        return _Operand(runs.to(self._runs.device), in_register, place)
