"""Mutations of thousands of genomes at once: the three of Chen et al. (2023, https://arxiv.org/abs/2302.06675), and others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaopt_symbolic.analysis import Known, Statements, valid
from metaopt_symbolic.language import FUNCTIONS, NUMBER_OF, PAPER
from metaopt_symbolic.population import ARITY, BITS, CONSTANT, MOST_VARIABLES, OF_TENSORS, Genomes, Set

_INSERT, _DELETE, _MODIFY, _TUNE = range(4)
_LARGEST = 1e10
_ATTEMPTS = 100


@dataclass(frozen=True)
class Mutation:
    """How children differ from their parents.

    A child has one more statement, one less, or one other argument. An argument becomes another variable that is defined
    there, a new constant from N(0, 1), or, if it is a constant, 2^a times itself with a from N(0, 1), within +-1e10; of what
    is possible, each is equally likely. That is the paper's, and the default; ``tune``, ``splice``, ``duplicate``, ``scales``
    and ``complement`` are ours, for more children that differ from their parents in what they do.

    Attributes:
        insert: weight of inserting a statement.
        delete: weight of deleting a statement.
        modify: weight of modifying an argument.
        tune: weight of modifying an argument that is a constant and stays one.
        functions: what inserted statements call.
        constant: probability that an argument of an inserted statement is a constant, where it may be.
        new: probability that the target of an inserted statement is a new variable.
        splice: probability that an inserted statement stands in the flow: it reads a variable that the statement after it
            reads, and that one reads the new value instead. Without it, most of what is inserted has no effect until something
            else changes (effective mutations; Brameier and Banzhaf, 2007, Linear Genetic Programming).
        duplicate: probability that an inserted statement computes what another one of the program says, which may then change
            alone (gene duplication; Koza, 1995, IJCAI). Spliced in, it is read in place of another variable.
        scales: of the exponents a, each equally likely: a from N(0, scale^2). Small ones tune.
        complement: probability that a constant c that is scaled becomes 1 - 2^a (1 - c) instead, which turns a decay of 0.9
            into 0.99 as easily as 0.1 into 0.01.

    Raises:
        ValueError: weights that are negative or all 0, probabilities outside [0, 1], scales that are none or not above 0, an
            unknown function.
    """

    insert: float = 1.0
    delete: float = 1.0
    modify: float = 1.0
    tune: float = 0.0
    functions: tuple[str, ...] = tuple(PAPER)
    constant: float = 0.25
    new: float = 0.5
    splice: float = 0.0
    duplicate: float = 0.0
    scales: tuple[float, ...] = (1.0,)
    complement: float = 0.0

    def __post_init__(self) -> None:
        weights = self.insert, self.delete, self.modify, self.tune
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"insert, delete, modify and tune must be at least 0 and not all 0, got {weights}")
        for name in ("constant", "new", "splice", "duplicate", "complement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be numbers above 0, at least one, got {self.scales}")
        unknown = set(self.functions) - set(FUNCTIONS)
        if unknown or not self.functions:
            raise ValueError(f"functions must be some of {', '.join(FUNCTIONS)}; got {sorted(unknown) or 'none'}")

    def children(self, parents: Genomes, generator: np.random.Generator) -> Genomes:
        """One valid child of each parent.

        Invalid children are thrown away and their parents mutated again; one that had only invalid ones after a hundred times
        (a program without constants, where only constants may change) is its own child.

        Args:
            parents: valid genomes.
            generator: the only source of randomness.
        """
        known = Known(parents, Statements(parents))
        children, is_new = self._attempt(parents, known.defined, known.tensors, generator)
        pending = np.flatnonzero(~(is_new & valid(children)))
        for _ in range(_ATTEMPTS - 1):
            if not len(pending):
                return children
            defined, tensors = known.defined[:, pending], known.tensors[:, pending]
            others, is_new = self._attempt(parents.select(pending), defined, tensors, generator)
            good = is_new & valid(others)
            children.put(pending[good], others.select(good))
            pending = pending[~good]
        children.put(pending, parents.select(pending))
        return children

    def _attempt(
        self, parents: Genomes, defined: Set, tensors: Set, generator: np.random.Generator
    ) -> tuple[Genomes, NDArray[np.bool_]]:
        """A child of each, and whether it is one: an empty program cannot lose a statement, nor a full one gain one."""
        count = len(parents)
        weights = np.cumsum((self.insert, self.delete, self.modify, self.tune))
        action = np.searchsorted(weights, generator.random(count) * weights[-1], side="right")
        inserts, deletes = action == _INSERT, action == _DELETE
        places = (generator.random(count) * (parents.lengths + inserts)).astype(np.int64)
        is_new = np.where(inserts, parents.lengths < parents.max_length, parents.lengths > 0)
        children = _shifted(parents, places, inserts & is_new, deletes & is_new)
        rows = np.flatnonzero(inserts & is_new)
        self._insert(children, rows, places[rows], defined, tensors, generator)
        for kind in (_MODIFY, _TUNE):
            rows = np.flatnonzero((action == kind) & is_new)
            is_new[rows] = self._modify(children, rows, defined, tensors, kind == _TUNE, generator)
        return children, is_new

    def _insert(
        self,
        genomes: Genomes,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        defined: Set,
        tensors: Set,
        generator: np.random.Generator,
    ) -> None:
        allowed = np.array([NUMBER_OF[name] for name in self.functions])
        functions = allowed[generator.integers(len(allowed), size=len(rows))]
        place = np.arange(3)
        used, of_tensor = place < ARITY[functions, None], place < OF_TENSORS[functions, None]
        sets = np.where(of_tensor, tensors[places, rows, None], defined[places, rows, None])
        args = _member(sets.ravel(), generator).reshape(-1, 3)
        args[~used | (~of_tensor & (generator.random(used.shape) < self.constant))] = CONSTANT
        constants = generator.standard_normal(used.shape)
        copied = spliced = np.zeros(len(rows), bool)
        if self.duplicate:
            lengths = genomes.lengths[rows] - 1
            line = (generator.random(len(rows)) * lengths).astype(np.int64)
            line += line >= places
            copied = (generator.random(len(rows)) < self.duplicate) & (lengths > 0)
            functions = np.where(copied, genomes.functions[rows, line], functions)
            args = np.where(copied[:, None], genomes.args[rows, line], args)
            constants = np.where(copied[:, None], genomes.constants[rows, line], constants)
            used = place < ARITY[functions, None]
        if self.splice:
            spliced, line, place = self._flow(genomes, rows, places, functions, generator)
            own = (generator.random(len(rows)) * ARITY[functions]).astype(np.int64)
            reads = spliced & ~copied
            args[reads, own[reads]] = genomes.args[rows, line, place][reads]
        genomes.functions[rows, places] = functions
        genomes.args[rows, places] = args
        genomes.constants[rows, places] = np.where(used & (args == CONSTANT), constants, 0.0)
        targets = genomes.targets[rows, places] = self._targets(genomes, rows, spliced, generator)
        if self.splice:
            genomes.args[rows[spliced], line[spliced], place[spliced]] = targets[spliced]

    def _flow(
        self,
        genomes: Genomes,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        functions: NDArray[np.int64],
        generator: np.random.Generator,
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Which statements are spliced in, and for each the line and the place of the argument that shall read it."""
        line = np.minimum(places + 1, genomes.max_length - 1)
        follows = places + 1 < genomes.lengths[rows]
        place = _true((genomes.args[rows, line] != CONSTANT) & follows[:, None], generator)
        spliced = (generator.random(len(rows)) < self.splice) & (place >= 0) & (ARITY[functions] > 0)
        return spliced, line, place

    def _targets(
        self, genomes: Genomes, rows: NDArray[np.int64], fresh: NDArray[np.bool_], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """A variable of the program, or one that it has not; where ``fresh``, the latter."""
        variables = genomes.variables
        assigned = np.where(
            np.arange(genomes.max_length) < genomes.lengths[rows, None], BITS[genomes.targets[rows]], np.uint64(0)
        )
        existing = np.bitwise_or.reduce(assigned, axis=1) | variables.set(
            (*variables.tensors, *variables.scalars, *variables.outputs)
        )
        others = ~existing & variables.set(variables.names)
        first = np.bitwise_count((others & (~others + np.uint64(1))) - np.uint64(1))
        is_new = ((generator.random(len(rows)) < self.new) | fresh) & (others != 0)
        return np.where(is_new, first, _member(existing, generator))

    def _modify(
        self,
        genomes: Genomes,
        rows: NDArray[np.int64],
        defined: Set,
        tensors: Set,
        only_constants: bool,
        generator: np.random.Generator,
    ) -> NDArray[np.bool_]:
        """Change an argument of each; False where there is none to change."""
        within = np.arange(genomes.max_length) < genomes.lengths[rows, None]
        arities = ARITY[genomes.functions[rows]] * within
        if only_constants:
            eligible = (np.arange(3) < arities[..., None]) & (genomes.args[rows] == CONSTANT)
            chosen = _true(eligible.reshape(len(rows), 3 * genomes.max_length), generator)
            line, place = np.divmod(chosen, 3)
        else:
            line = chosen = _true(arities > 0, generator)
            place = (generator.random(len(rows)) * arities[np.arange(len(rows)), line]).astype(np.int64)
        args = genomes.args[rows, line, place]
        numbers = genomes.constants[rows, line, place]
        is_constant = args == CONSTANT
        of_tensor = place < OF_TENSORS[genomes.functions[rows, line]]
        sets = np.where(of_tensor, tensors[line, rows], defined[line, rows]) & ~BITS[args]
        may_read = (sets != 0) & (not only_constants)
        what = _true(np.stack([may_read, ~of_tensor, is_constant], 1), generator)
        scaled = np.clip(self._scaled(numbers, generator), -_LARGEST, _LARGEST)
        fresh = generator.standard_normal(len(rows))
        changed = (chosen >= 0) & (what >= 0)
        at = rows[changed], line[changed], place[changed]
        genomes.args[at] = np.where(what == 0, _member(sets, generator), CONSTANT)[changed]
        genomes.constants[at] = np.where(what == 0, 0.0, np.where(what == 1, fresh, scaled))[changed]
        return changed

    def _scaled(self, numbers: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        """Constants with other magnitudes, or, by ``complement``, at another distance from 1."""
        exponents = generator.standard_normal(len(numbers))
        scales = np.array(self.scales)[generator.integers(len(self.scales), size=len(numbers))]
        factors = 2.0 ** (scales * exponents)
        if not self.complement:
            return numbers * factors
        return np.where(
            generator.random(len(numbers)) < self.complement, 1 - factors * (1 - numbers), numbers * factors
        )


def _shifted(
    parents: Genomes, places: NDArray[np.int64], inserts: NDArray[np.bool_], deletes: NDArray[np.bool_]
) -> Genomes:
    """Copies with room for a statement at ``places``, or without the one that is there."""
    count, room = parents.functions.shape
    line, place = np.arange(room), places[:, None]
    source = line - (inserts[:, None] & (line > place)) + (deletes[:, None] & (line >= place))
    flat = (np.minimum(source, room - 1) + room * np.arange(count)[:, None]).ravel()
    children = Genomes(
        parents.variables,
        parents.functions.reshape(-1)[flat].reshape(count, room),
        parents.targets.reshape(-1)[flat].reshape(count, room),
        parents.args.reshape(-1, 3)[flat].reshape(count, room, 3),
        parents.constants.reshape(-1, 3)[flat].reshape(count, room, 3),
        parents.lengths + inserts - deletes,
    )
    rows = np.flatnonzero(deletes)
    ends = children.lengths[rows]
    children.functions[rows, ends] = children.targets[rows, ends] = 0
    children.args[rows, ends] = CONSTANT
    children.constants[rows, ends] = 0.0
    return children


def _true(mask: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.int64]:
    """In each row of [n, m] the number of a column that is true, each equally likely; -1 where none is."""
    counts = mask.sum(1)
    rank = (generator.random(len(mask)) * counts).astype(np.int64)
    found = (np.cumsum(mask, 1, dtype=np.int16) > rank[:, None]).argmax(1)
    return np.where(counts > 0, found, -1)


def _member(sets: Set, generator: np.random.Generator) -> NDArray[np.int64]:
    """A variable of each set, each equally likely; -1 of the empty set."""
    octets = sets.astype("<u8").view(np.uint8).reshape(-1, MOST_VARIABLES // 8)
    return _true(np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_), generator)
