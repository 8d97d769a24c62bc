"""Losses from losses: mutated, and joined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metaopt.program.program import Arg
from metaopt.search import Validator
from metaopt_symbolic.analysis import without_redundant
from metaopt_symbolic.genome import LOSS, LOSS_SEEDS, Assign, Genome
from metaopt_symbolic.language import LOSSES
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.proposals.mutator import Mutator

MUTATION = Mutation(functions=(*LOSSES, "interpolate"), tune=0.5, splice=0.5, duplicate=0.3, scales=(1.0, 0.3))
LONGEST = 24
"""Statements of a candidate, unless the request says fewer."""


class LossMutator(Mutator):
    """Mutates a parent one to four times, or first joins two: loss = (1 - w) a + w b, with w from U(0, 1).

    Args:
        validate: as of `Mutator`.
        seed: as of `Mutator`.
        join: probability of joining two parents, in [0, 1].
        attempts: as of `Mutator`.
        name: as of `Mutator`.

    Raises:
        ValueError: a probability outside [0, 1], or no attempts.
    """

    def __init__(
        self, validate: Validator, seed: int = 0, join: float = 0.2, attempts: int = 64, name: str = "mutator"
    ) -> None:
        if not 0 <= join <= 1:
            raise ValueError(f"join must be in [0, 1], got {join}")
        super().__init__(validate, MUTATION, LOSS_SEEDS, LONGEST, seed, attempts, name)
        self._join = join

    def child(self, parents: list[Genome], rng: np.random.Generator) -> Genome:
        """See the class."""
        one, two = (parents[k] for k in rng.integers(len(parents), size=2))
        child = joined(one, two, round(float(rng.uniform()), 3)) if rng.random() < self._join else one
        return tidy(without_redundant(self.mutated(child, rng)))


def joined(one: Genome, two: Genome, weight: float) -> Genome:
    """The loss (1 - weight) one + weight two, of two losses of the same inputs."""
    first, second = numbered(one, 1, 4), numbered(two, 1 + len(one.body), 4)
    mixed = Assign(LOSS, "interpolate", (first[-1].target, second[-1].target, weight))
    return replace(one, body=(*first, *second, mixed))


def tidy(genome: Genome) -> Genome:
    """A loss without redundant assignments, with x1, x2, ... for its variables and numbers of four digits."""
    *body, last = numbered(genome, 1, 4)
    return replace(genome, body=(*body, last._replace(target=LOSS)))


def numbered(genome: Genome, start: int, digits: int = 17) -> list[Assign]:
    """The assignments of a loss, with x and a number from ``start`` on for their variables; the last one is the loss.

    Args:
        genome: of a loss, without redundant assignments.
        start: number of the first variable.
        digits: of the constants; 17 are all.
    """
    local: dict[str, str] = {}

    def arg(value: Arg) -> Arg:
        return local.get(value, value) if isinstance(value, str) else float(f"{value:.{digits}g}")

    body = []
    for k, (target, function, args) in enumerate(genome.body, start):
        body.append(Assign(f"x{k}", function, tuple(map(arg, args))))
        local[target] = f"x{k}"
    return body
