"""N genomes as arrays, for work on thousands of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from metaopt_symbolic.genome import Assign, Genome, GenomeError
from metaopt_symbolic.language import FUNCTIONS, NUMBER_OF

MOST_VARIABLES = 64
"""A set of variables is the bits of one uint64."""

CONSTANT = -1
"""In place of a variable's number: the argument is a constant."""

NAMES = tuple(FUNCTIONS)
ARITY = np.array([function.arity for function in FUNCTIONS.values()])
OF_TENSORS = np.array([function.of_tensors for function in FUNCTIONS.values()])

BITS: NDArray[np.uint64] = np.append(np.uint64(1) << np.arange(MOST_VARIABLES, dtype=np.uint64), np.uint64(0))
"""The set of one variable, by its number; of `CONSTANT`, the last, the empty set."""

Set = NDArray[np.uint64]
"""Sets of variables."""


@dataclass(frozen=True)
class Variables:
    """What the programs of a search may assign and read; a variable's number is its place in ``names``.

    Attributes:
        tensors: as in `Genome`.
        scalars: as in `Genome`.
        outputs: as in `Genome`.
        locals: all other variables.

    Raises:
        GenomeError: more than 64 variables.
    """

    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    outputs: tuple[str, ...]
    locals: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) > MOST_VARIABLES:
            raise GenomeError(
                f"a population has at most {MOST_VARIABLES} variables, got {len(self.names)}; let locals share names"
            )

    @classmethod
    def of(cls, genome: Genome) -> Variables:
        """The genome's, and as many further locals as there is room for."""
        own = tuple(
            dict.fromkeys([*genome.tensors, *genome.scalars, *genome.outputs, *(a.target for a in genome.body)])
        )
        fixed = {*genome.tensors, *genome.scalars, *genome.outputs}
        fresh = (name for k in itertools.count() if (name := f"x{k}") not in own)
        more = itertools.islice(fresh, max(0, MOST_VARIABLES - len(own)))
        locals = (*(name for name in own if name not in fixed), *more)
        return cls(genome.tensors, genome.scalars, genome.outputs, locals)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensors, scalars, outputs that are no inputs, locals."""
        return tuple(dict.fromkeys([*self.tensors, *self.scalars, *self.outputs, *self.locals]))

    @cached_property
    def number(self) -> dict[str, int]:
        """By name."""
        return {name: k for k, name in enumerate(self.names)}

    def set(self, names: Sequence[str]) -> np.uint64:
        """The set of these variables."""
        return np.bitwise_or.reduce(BITS[[self.number[name] for name in names]], initial=np.uint64(0))


@dataclass(frozen=True)
class Genomes:
    """N programs over the same variables, of at most L statements.

    What is not used is fixed, so that equal rows are equal programs: statements after the last are 0, with constant arguments
    of 0.0, and so are arguments beyond a function's arity.

    Attributes:
        variables: what they assign and read.
        functions: int16 [N, L], numbers of functions (`metaopt_symbolic.language.NUMBER_OF`).
        targets: int16 [N, L], numbers of variables.
        args: int16 [N, L, 3], numbers of variables, or `CONSTANT`.
        constants: float64 [N, L, 3], the arguments that are constants.
        lengths: int64 [N], how many statements each program has.
    """

    variables: Variables
    functions: NDArray[np.int16]
    targets: NDArray[np.int16]
    args: NDArray[np.int16]
    constants: NDArray[np.float64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, genomes: Sequence[Genome], max_length: int = 64, variables: Variables | None = None) -> Genomes:
        """Genomes as arrays.

        Args:
            genomes: of the same inputs and outputs.
            max_length: how many statements there is room for.
            variables: of the population; without it, those of the first genome. Other locals take the names of locals that
                their genome does not use.

        Raises:
            GenomeError: no genome, other inputs or outputs, a longer genome, or one with too many locals.
        """
        if not genomes:
            raise GenomeError("a population needs at least one genome, got none")
        variables = variables or Variables.of(genomes[0])
        empty = cls._empty(variables, len(genomes), max_length)
        for k, genome in enumerate(genomes):
            empty._write(k, genome)
        return empty

    @classmethod
    def concatenate(cls, parts: Sequence[Genomes]) -> Genomes:
        """One after the other; all of the same variables and room."""
        first = parts[0]
        if any(p.variables != first.variables or p.max_length != first.max_length for p in parts):
            raise GenomeError("populations can be joined only if they have the same variables and the same max_length")
        return cls(
            first.variables, *(np.concatenate(columns) for columns in zip(*(p._arrays for p in parts), strict=True))
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """How many statements there is room for."""
        return self.functions.shape[1]

    def select(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> Genomes:
        """Some of the programs."""
        return Genomes(self.variables, *(array[rows] for array in self._arrays))

    def put(self, rows: NDArray[np.integer], others: Genomes) -> None:
        """Replace programs, in place."""
        for array, new in zip(self._arrays, others._arrays, strict=True):
            array[rows] = new

    def __getitem__(self, k: int) -> Genome:
        names = self.variables.names
        body = []
        for j in range(self.lengths[k]):
            arguments = zip(self.args[k, j].tolist(), self.constants[k, j].tolist(), strict=True)
            args = [constant if arg == CONSTANT else names[arg] for arg, constant in arguments]
            function = NAMES[self.functions[k, j]]
            body.append(Assign(names[self.targets[k, j]], function, tuple(args[: FUNCTIONS[function].arity])))
        return Genome(self.variables.tensors, self.variables.scalars, self.variables.outputs, tuple(body))

    @property
    def _arrays(self) -> tuple[NDArray, ...]:
        return self.functions, self.targets, self.args, self.constants, self.lengths

    @classmethod
    def _empty(cls, variables: Variables, count: int, max_length: int) -> Genomes:
        statements = (count, max_length)
        return cls(
            variables,
            np.zeros(statements, np.int16),
            np.zeros(statements, np.int16),
            np.full((*statements, 3), CONSTANT, np.int16),
            np.zeros((*statements, 3)),
            np.zeros(count, np.int64),
        )

    def _write(self, k: int, genome: Genome) -> None:
        v = self.variables
        if (genome.tensors, genome.scalars, genome.outputs) != (v.tensors, v.scalars, v.outputs):
            raise GenomeError(
                f"all genomes of a population have the inputs {v.tensors + v.scalars} and the outputs {v.outputs}, "
                f"got {genome.tensors + genome.scalars} and {genome.outputs}"
            )
        if len(genome.body) > self.max_length:
            raise GenomeError(
                f"a genome of this population has at most {self.max_length} lines, got {len(genome.body)}"
            )
        targets = dict.fromkeys(assign.target for assign in genome.body)
        free = (name for name in v.locals if name not in targets)
        places = dict(v.number)
        for name in targets:
            if name not in places:
                taken = next(free, None)
                if taken is None:
                    raise GenomeError(f"a genome has at most {len(v.locals)} locals, got {len(targets)} variables")
                places[name] = v.number[taken]
        for j, (target, function, args) in enumerate(genome.body):
            self.functions[k, j] = NUMBER_OF[function]
            self.targets[k, j] = places[target]
            for i, arg in enumerate(args):
                if isinstance(arg, str):
                    self.args[k, j, i] = places[arg]
                else:
                    self.constants[k, j, i] = arg
        self.lengths[k] = len(genome.body)
