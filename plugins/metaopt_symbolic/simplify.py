"""A champion as its ten lines: without what does nothing, and without what hardly does.

In order: redundant statements go; the numbers that statements make of numbers are written down; each statement is left out, or
one of its arguments put in its place, where fitness loses less than a tolerance; evolution without insertions tries several of
these changes at once; numbers are rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from metaopt.program.ops import OPS
from metaopt.program.program import Arg, Program
from metaopt_symbolic.analysis import without_redundant
from metaopt_symbolic.cascade import Score
from metaopt_symbolic.genome import Assign, Genome, GenomeError
from metaopt_symbolic.language import FUNCTIONS
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes

Scores = Callable[[Sequence[Program]], list[Score]]


@dataclass(frozen=True)
class Simplified:
    """What `simplify` found.

    Attributes:
        genome: the simpler program.
        before, after: fitness of the program that was given, and of this one.
        log: what was done, a line each.
    """

    genome: Genome
    before: float
    after: float
    log: tuple[str, ...]


def simplify(
    genome: Genome, scores: Scores, *, tolerance: float, rounds: int = 100, evolution: int = 0, seed: int = 0
) -> Simplified:
    """Shorten ``genome`` as long as its fitness stays within ``tolerance`` of what it was.

    Args:
        genome: valid.
        scores: how good programs are; one stage, so that fitness can be compared (`Cascade.scores`).
        tolerance: loss of fitness that is worth a line; at least 0.
        rounds: changes at most.
        evolution: children of the evolution without insertions; 0: none.
        seed: of that.

    Raises:
        ValueError: a negative tolerance, or a program without a finite fitness.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    current = folded(without_redundant(genome))
    (first,) = scores([current.program()])
    if not math.isfinite(first.fitness):
        raise ValueError("only a program with a finite fitness can be simplified; this one diverges")
    log = [f"{len(genome.body) - len(current.body)} redundant or constant statements left out"]
    fitness, least = first.fitness, first.fitness - tolerance

    def settled(candidates: Sequence[Genome], what: str) -> bool:
        """Take the shortest candidate that is good enough, of equal ones the best."""
        nonlocal current, fitness
        fresh = [*{c.digest: c for c in candidates if _size(c) < _size(current)}.values()]
        trained = scores([c.program() for c in fresh]) if fresh else []
        found = [
            (_size(c), -s.fitness, k) for k, (c, s) in enumerate(zip(fresh, trained, strict=True)) if s.fitness >= least
        ]
        if not found:
            return False
        _, loss, k = min(found)
        log.append(
            f"{what}: {len(current.body)} -> {len(fresh[k].body)} statements, fitness {fitness:.5f} -> {-loss:.5f}"
        )
        current, fitness = fresh[k], -loss
        return True

    for _ in range(rounds):
        if not settled([*ablations(current)], "ablation"):
            break
    if evolution:
        for _ in range(rounds):
            if not settled([*_smaller(current, evolution, seed)], "evolution without insertions"):
                break
    for _ in range(rounds):
        if not settled([*roundings(current)], "rounding"):
            break
    return Simplified(current, first.fitness, fitness, tuple(log))


def _size(genome: Genome) -> tuple[int, int]:
    """Statements, then digits of numbers."""
    digits = sum(len(repr(arg)) for a in genome.body for arg in a.args if isinstance(arg, float))
    return len(genome.body), digits


def folded(genome: Genome) -> Genome:
    """The same program with the value written for what is computed of numbers alone."""
    numbers: dict[str, float] = {}
    body = []
    for target, function, args in genome.body:
        args = tuple(numbers.get(arg, arg) if isinstance(arg, str) else arg for arg in args)
        if all(isinstance(arg, float) for arg in args) and not FUNCTIONS[function].of_tensors:
            numbers[target] = _value(function, args)
            if target in genome.outputs:
                body.append(Assign(target, "copy", (numbers[target],)))
        else:
            numbers.pop(target, None)
            body.append(Assign(target, function, args))
    return without_redundant(dataclasses.replace(genome, body=tuple(body)))


def _value(function: str, args: Sequence[Arg]) -> float:
    def emit(op: str, *values: float) -> float:
        return OPS[op].scalar(*values)

    return float(FUNCTIONS[function].expand(emit, *args))


def ablations(genome: Genome) -> Iterator[Genome]:
    """Every program that lacks one statement, or has one of its arguments in its place."""
    for k, (target, _, args) in enumerate(genome.body):
        before, after = genome.body[:k], genome.body[k + 1 :]
        yield from _valid(genome, before + after)
        for arg in dict.fromkeys(args):
            if isinstance(arg, str) and arg != target:
                yield from _valid(genome, before + _reading(after, target, arg))
        for arg in dict.fromkeys(args):
            yield from _valid(genome, (*before, Assign(target, "copy", (arg,)), *after))


def _reading(body: Sequence[Assign], name: str, other: Arg) -> tuple[Assign, ...]:
    """``body`` with ``other`` where it read ``name``, until that is assigned anew."""
    changed, until = [], False
    for target, function, args in body:
        changed.append(
            Assign(target, function, args if until else tuple(other if arg == name else arg for arg in args))
        )
        until = until or target == name
    return tuple(changed)


def _valid(genome: Genome, body: Sequence[Assign]) -> Iterator[Genome]:
    try:
        made = folded(dataclasses.replace(genome, body=tuple(body)))
        made.program()
    except (GenomeError, ValueError):
        return
    yield made


def roundings(genome: Genome) -> Iterator[Genome]:
    """Every program with one number in fewer digits; and the one with all numbers so."""
    for digits in (1, 2, 3, 4):
        yield from _valid(
            genome, [a._replace(args=tuple(_rounded(arg, digits) for arg in a.args)) for a in genome.body]
        )
        for k, a in enumerate(genome.body):
            for i, arg in enumerate(a.args):
                if isinstance(arg, float):
                    args = (*a.args[:i], _rounded(arg, digits), *a.args[i + 1 :])
                    yield from _valid(genome, (*genome.body[:k], a._replace(args=args), *genome.body[k + 1 :]))


def _rounded(arg: Arg, digits: int) -> Arg:
    """To so many digits; numbers just below 1, as decays, to so many digits of their distance from it."""
    if isinstance(arg, str) or not math.isfinite(arg):
        return arg
    if 0.9 < arg < 1:
        return round(1 - float(f"{1 - arg:.{digits}g}"), 12)
    return float(f"{arg:.{digits}g}")


def _smaller(genome: Genome, count: int, seed: int) -> Iterator[Genome]:
    """Programs with up to three statements deleted or arguments changed."""
    mutation = Mutation(insert=0.0, delete=1.0, modify=1.0)
    rng = np.random.default_rng(seed)
    children = Genomes.of([genome] * count)
    for _ in range(3):
        children = mutation.children(children, rng)
        for k in range(count):
            yield from _valid(genome, children[k].body)
