"""Genomes to test with: descendants of AdamW that nothing has selected, and random rows that are mostly no programs."""

from __future__ import annotations

from functools import cache

import numpy as np

from metaopt_symbolic.genome import SEEDS, Genome, parse
from metaopt_symbolic.language import EXTRAS, PAPER
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import ARITY, CONSTANT, Genomes

ADAMW = parse(SEEDS["adamw"])

EVERYTHING = Mutation(functions=tuple(PAPER | EXTRAS), insert=2.0)
"""With every function but those of matrices, and programs that grow."""


@cache
def descendants(count: int = 500, seed: int = 0) -> Genomes:
    """``count`` each of AdamW's 1st to 12th generation of children, and as many of the 30th."""
    rng = np.random.default_rng(seed)
    generation, kept = Genomes.of([ADAMW] * count, max_length=48), []
    for k in range(30):
        generation = EVERYTHING.children(generation, rng)
        if k < 12 or k == 29:
            kept.append(generation)
    return Genomes.concatenate(kept)


def random_rows(count: int, seed: int) -> Genomes:
    """Statements of anything, of 1 to 4 lines: what they read may be undefined, what they reduce no tensor."""
    rng = np.random.default_rng(seed)
    rows = Genomes.of([Genome(ADAMW.tensors, ADAMW.scalars, ("w", "m", "v"), ())] * count, max_length=4)
    rows.lengths[:] = rng.integers(1, 5, count)
    for k, j in zip(*np.nonzero(np.arange(4) < rows.lengths[:, None]), strict=True):
        rows.functions[k, j] = rng.integers(len(PAPER))
        rows.targets[k, j] = rng.integers(7)
        for i in range(ARITY[rows.functions[k, j]]):
            rows.args[k, j, i] = rng.integers(CONSTANT, 7)
            rows.constants[k, j, i] = rng.normal() if rows.args[k, j, i] == CONSTANT else 0.0
    return rows


def renamed(genome: Genome, prefix: str = "other") -> Genome:
    """With other names for what is neither input nor output."""
    fixed = {*genome.tensors, *genome.scalars, *genome.outputs}
    names = {a.target: f"{prefix}{k}" for k, a in enumerate(genome.body) if a.target not in fixed}
    body = tuple(
        a._replace(
            target=names.get(a.target, a.target),
            args=tuple(names.get(arg, arg) if isinstance(arg, str) else arg for arg in a.args),
        )
        for a in genome.body
    )
    return Genome(genome.tensors, genome.scalars, genome.outputs, body)
