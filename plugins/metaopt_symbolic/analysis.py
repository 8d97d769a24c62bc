"""Abstract execution of thousands of genomes at once: kinds, dependencies, liveness across steps, and a hash.

All of it is one or two walks over the statements of all programs side by side, with sets of variables as the bits of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from metaopt.program.ops import OPS
from metaopt_symbolic.genome import Genome
from metaopt_symbolic.language import FUNCTIONS, NUMBER_OF, Kind
from metaopt_symbolic.population import ARITY, BITS, CONSTANT, MOST_VARIABLES, NAMES, OF_TENSORS, Genomes, Set

_REDUCES = np.array([function.reduces for function in FUNCTIONS.values()])
_COMMUTES = np.array([function.commutes for function in FUNCTIONS.values()])
_COPY = NUMBER_OF["copy"]


class Statements:
    """Which variables the statements of N programs read and write; all arrays are [L, N], L the longest program's.

    Attributes:
        reads: sets of variables.
        writes: the set of the target; empty after a program's end.
        needs: of what is read, what must be a tensor.
        wrong: bool [2, L, N], whether a constant stands for a tensor as first and as second argument.
        reduces: 1 where a number is made of tensors, else 0.
    """

    def __init__(self, genomes: Genomes) -> None:
        longest = int(genomes.lengths.max(initial=0))
        functions = genomes.functions[:, :longest].T
        args = genomes.args[:, :longest].transpose(2, 1, 0)
        bits = BITS[args]
        tensors = OF_TENSORS[functions]
        within: NDArray[np.bool_] = np.arange(longest)[:, None] < genomes.lengths
        self.reads: Set = bits[0] | bits[1] | bits[2]
        self.writes: Set = np.where(within, BITS[genomes.targets[:, :longest].T], np.uint64(0))
        self.needs: Set = bits[0] * (tensors > 0) | bits[1] * (tensors > 1)
        self.wrong: NDArray[np.bool_] = (tensors > np.arange(2)[:, None, None]) & (args[:2] == CONSTANT)
        self.reduces = _REDUCES[functions].astype(np.uint64)


class Known:
    """The variables that have a value before each statement and after the last.

    Attributes:
        defined: sets [L + 1, N].
        tensors: sets [L + 1, N]; those with a value per element.
        valid: bool [N]. A program is valid if it reads no undefined variable, reduces only tensors and has tensors for outputs.
    """

    def __init__(self, genomes: Genomes, statements: Statements) -> None:
        s, variables = statements, genomes.variables
        length, count = s.reads.shape
        self.defined: Set = np.empty((length + 1, count), np.uint64)
        self.tensors: Set = np.empty((length + 1, count), np.uint64)
        self.defined[0] = variables.set(variables.tensors + variables.scalars)
        self.tensors[0] = variables.set(variables.tensors)
        for k in range(length):
            writes = s.writes[k]
            is_tensor = ((s.reads[k] & self.tensors[k]) != 0) & (s.reduces[k] == 0)
            np.bitwise_or(self.defined[k], writes, out=self.defined[k + 1])
            np.bitwise_or(self.tensors[k] & ~writes, writes * is_tensor, out=self.tensors[k + 1])
        faults = (s.reads & ~self.defined[:-1]) | (s.needs & ~self.tensors[:-1]) | s.wrong.any(0)
        outputs = variables.set(variables.outputs)
        self.valid: NDArray[np.bool_] = ~faults.any(0) & ((self.tensors[-1] & outputs) == outputs)


def valid(genomes: Genomes) -> NDArray[np.bool_]:
    """Whether each genome has a `Genome.program`, [N]."""
    return Known(genomes, Statements(genomes)).valid


@dataclass(frozen=True)
class Analysis:
    """What is known of N genomes of O outputs, S slots and L statements; nothing but ``valid`` holds for invalid ones.

    Attributes:
        valid: bool [N], whether the genome has a `Genome.program`.
        kinds: uint8 [N, L], the `Kind` of each statement's value; `Kind.UNDEFINED` after the last statement.
        depends: uint64 [N, O], the inputs that each output of one step depends on (`metaopt_symbolic.population.BITS`).
        reads: uint64 [N], the inputs of this and earlier steps that the update depends on.
        live_slots: bool [N, S], whether a slot ever reaches an update of a later step.
        live: bool [N, L], whether a statement reaches an update of this or a later step; others are redundant.
        redundant: float64 [N], the share of redundant statements.
        hashes: uint64 [N], the same for genomes that differ in the names of variables, in redundant statements and slots, in
            the order of statements where it is immaterial, in the order of the arguments of functions that commute, in copies,
            and in how a constant comes about. With k different programs, two have one hash by chance with probability
            k^2 / 2^65.
    """

    valid: NDArray[np.bool_]
    kinds: NDArray[np.uint8]
    depends: Set
    reads: Set
    live_slots: NDArray[np.bool_]
    live: NDArray[np.bool_]
    redundant: NDArray[np.float64]
    hashes: NDArray[np.uint64]


def analyse(genomes: Genomes) -> Analysis:
    """Execute genomes abstractly: by kinds, by sets of variables, and by hashes."""
    statements = Statements(genomes)
    known = Known(genomes, statements)
    used, depends = _backward(genomes, statements)
    live_outputs = _live_outputs(genomes, depends)
    live = np.zeros(genomes.functions.shape, bool)
    live[:, : len(used)] = (used & live_outputs).any(1).T
    reads = np.bitwise_or.reduce(depends * live_outputs, axis=0, initial=np.uint64(0))
    kinds = np.zeros(genomes.functions.shape, np.uint8)
    kinds[:, : len(used)] = _kinds(genomes, statements, known).T
    return Analysis(
        known.valid,
        kinds,
        depends.T,
        reads,
        live_outputs[1:].T,
        live,
        1 - live.sum(1) / np.maximum(genomes.lengths, 1),
        _hashes(genomes, statements, live & known.valid[:, None], live_outputs),
    )


def _backward(genomes: Genomes, s: Statements) -> tuple[NDArray[np.bool_], Set]:
    """Which statements each output needs, [L, O, N], and which inputs, [O, N]."""
    variables, (length, count) = genomes.variables, s.reads.shape
    outputs = [variables.number[name] for name in variables.outputs]
    needed = np.repeat(BITS[outputs, None], count, axis=1)
    used = np.empty((length, len(outputs), count), bool)
    for k in reversed(range(length)):
        np.not_equal(needed & s.writes[k], 0, out=used[k])
        needed &= ~s.writes[k]
        needed |= s.reads[k] * used[k]
    return used, needed


def _live_outputs(genomes: Genomes, depends: Set) -> NDArray[np.bool_]:
    """Whether each output, [O, N], ever reaches an update: the first does, and the slots that a live output depends on."""
    variables = genomes.variables
    slots = variables.outputs[1:]
    live = np.zeros(depends.shape, bool)
    live[0] = True
    for _ in slots:
        reached = np.bitwise_or.reduce(depends * live, axis=0)
        live[1:] = [(reached & variables.set([slot])) != 0 for slot in slots]
    return live


def _kinds(genomes: Genomes, s: Statements, known: Known) -> NDArray[np.uint8]:
    numbers = np.zeros(len(genomes), np.uint64)
    kinds = np.empty(s.reads.shape, np.uint8)
    for k, writes in enumerate(s.writes):
        of_tensor = (known.tensors[k + 1] & writes) != 0
        is_number = ((s.reduces[k] != 0) | ((s.reads[k] & numbers) != 0)) & ~of_tensor
        numbers = (numbers & ~writes) | writes * is_number
        kinds[k] = Kind.SCALAR + is_number + 2 * of_tensor
    kinds[s.writes == 0] = Kind.UNDEFINED
    return kinds


# -- hashes --------------------------------------------------------------------------------------------------------------

_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
"""What an argument's hash is multiplied with, by its place."""


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _of_numbers(values: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Hashes of constants: of their bits, all NaNs alike."""
    bits = np.where(np.isnan(values), np.nan, values).view(np.uint64)
    return _mixed(bits ^ np.uint64(0xD6E8FEB86659FD93))


def _of_names(names: Sequence[str]) -> NDArray[np.uint64]:
    """The same on every machine, unlike Python's own."""
    return np.array([int.from_bytes(sha256(name.encode()).digest()[:8]) for name in names], np.uint64)


_OF_FUNCTIONS = _of_names(NAMES)
_OF_SLOTS = _of_names([f"slot {k}" for k in range(MOST_VARIABLES)])


def _hashes(
    genomes: Genomes, s: Statements, live: NDArray[np.bool_], live_outputs: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """A value's hash is that of its function and its arguments' hashes: those of slots by place, of constants by bits."""
    variables, (length, count) = genomes.variables, s.reads.shape
    functions = genomes.functions[:, :length].T
    args = genomes.args[:, :length].transpose(2, 1, 0)
    constant = (args == CONSTANT) & (np.arange(3)[:, None, None] < ARITY[functions])
    constants = _of_numbers(genomes.constants[:, :length].transpose(2, 1, 0))
    factors = np.broadcast_to(_ODD[:, None, None], args.shape).copy()
    factors[1] = np.where(_COMMUTES[functions], _ODD[0], _ODD[1])
    begun = _OF_FUNCTIONS[functions] + (constants * factors * constant).sum(0)
    folds = _computed_of_constants(genomes, s) & live[:, :length].T
    # one row beyond the variables stands for constants, and is 0 until a program's end
    rows, columns = len(variables.names), np.arange(count)
    hashes = np.zeros((rows + 1, count), np.uint64)
    inputs = variables.tensors + variables.scalars
    hashes[: len(inputs)] = _of_names([f"input {name}" for name in inputs])[:, None]
    outputs = [variables.number[name] for name in variables.outputs]
    of_outputs = _OF_SLOTS[live_outputs.cumsum(0) - 1]  # by place among the live ones
    hashes[outputs[1:]] = of_outputs[1:]
    flat = hashes.reshape(-1)
    read = np.where(args == CONSTANT, rows, args).astype(np.int64) * count + columns
    written = np.where(s.writes == 0, rows, genomes.targets[:, :length].T).astype(np.int64) * count + columns
    copies = functions == _COPY
    any_copy, any_fold = np.any(copies, axis=1), np.any(folds, axis=1)
    values = np.zeros((rows, count))
    for k in range(length):
        first = flat.take(read[0, k])
        x = first * factors[0, k]
        x += flat.take(read[1, k]) * factors[1, k]
        x += flat.take(read[2, k]) * factors[2, k]
        x += begun[k]
        _mixed(x)
        if any_copy[k]:
            x = np.where(copies[k], np.where(constant[0, k], constants[0, k], first), x)
        if any_fold[k]:
            chosen = np.flatnonzero(folds[k])
            folded = _fold(genomes, values, k, chosen)
            values[genomes.targets[chosen, k], chosen] = folded
            x[chosen] = _of_numbers(folded)
        flat[written[k]] = x
    return _mixed((_mixed(hashes[outputs] + of_outputs) * live_outputs).sum(0))


def _computed_of_constants(genomes: Genomes, s: Statements) -> NDArray[np.bool_]:
    """Which statements, [L, N], depend on no input."""
    known = np.zeros(len(genomes), np.uint64)
    found = np.empty(s.reads.shape, bool)
    for k, writes in enumerate(s.writes):
        found[k] = (s.reads[k] & ~known) == 0
        known = (known & ~writes) | writes * found[k]
    return found


def _fold(genomes: Genomes, values: NDArray[np.float64], k: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values of statement k of some programs, whose variables have ``values`` [V, N]."""
    args = genomes.args[rows, k]
    numbers = np.where(args == CONSTANT, genomes.constants[rows, k], values[args, rows[:, None]])
    functions = genomes.functions[rows, k].tolist()
    return np.array([_value(f, *bits) for f, bits in zip(functions, numbers.view(np.uint64).tolist(), strict=True)])


@lru_cache(1 << 16)
def _value(function: int, *bits: int) -> float:
    """Of a function of constants; given by their bits, since 0.0 == -0.0."""
    args = np.array(bits, np.uint64).view(np.float64).tolist()
    f = FUNCTIONS[NAMES[function]]
    return float(f.expand(lambda op, *operands: OPS[op].scalar(*operands), *args[: f.arity]))


# -- one genome ----------------------------------------------------------------------------------------------------------


def without_redundant(genome: Genome) -> Genome:
    """The genome's live statements and live slots only.

    Raises:
        GenomeError: more than 64 variables.
    """
    genomes = Genomes.of([genome], max_length=max(len(genome.body), 1))
    return live_part(genome, analyse(genomes), 0)


def live_part(genome: Genome, analysis: Analysis, k: int) -> Genome:
    """The live statements and slots of a genome, where it is the k-th that was analysed."""
    dead = {slot for slot, is_live in zip(genome.outputs[1:], analysis.live_slots[k], strict=True) if not is_live}
    tensors, outputs = (tuple(n for n in names if n not in dead) for names in (genome.tensors, genome.outputs))
    live = analysis.live[k, : len(genome.body)].tolist()
    body = tuple(assign for assign, is_live in zip(genome.body, live, strict=True) if is_live)
    return Genome(tensors, genome.scalars, outputs, body)
