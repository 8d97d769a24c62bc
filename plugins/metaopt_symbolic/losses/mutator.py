"""The proposer that needs no server: it mutates and joins what it is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metaopt.program.program import Arg
from metaopt.search import Proposal, ProposerError, Request, Validator
from metaopt_symbolic.analysis import without_redundant
from metaopt_symbolic.genome import LOSS, LOSS_SEEDS, Assign, Genome, parse
from metaopt_symbolic.language import LOSSES
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes

MUTATION = Mutation(functions=(*LOSSES, "interpolate"), tune=0.5, splice=0.5, duplicate=0.3, scales=(1.0, 0.3))
LONGEST = 24
"""Statements of a candidate, unless the request says fewer."""


class Mutator:
    """Mutates a parent one to four times, or first joins two: loss = (1 - w) a + w b, with w from U(0, 1).

    A proposal is a function of the request and the seed alone, so that a search that goes on proposes the same.

    Args:
        validate: what is wrong with a candidate.
        seed: of the mutations.
        join: probability of joining two parents, in [0, 1].
        attempts: children that are tried until one is valid.
        name: of the proposer.

    Raises:
        ValueError: a probability outside [0, 1], or no attempts.
    """

    def __init__(
        self, validate: Validator, seed: int = 0, join: float = 0.2, attempts: int = 64, name: str = "mutator"
    ) -> None:
        if not 0 <= join <= 1 or attempts < 1:
            raise ValueError(f"join must be in [0, 1] and attempts at least 1, got {join} and {attempts}")
        self.name = name
        self._validate, self._seed, self._join, self._attempts = validate, seed, join, attempts

    def propose(self, request: Request) -> Proposal:
        """A valid candidate; of parents that are no programs, none of them has children.

        Raises:
            ProposerError: none of the attempts was valid.
        """
        rng = np.random.default_rng([self._seed, request.number])
        shown = request.parents or request.elites
        parents = [parse(elite.facts["program"]) for elite in shown] or [parse(text) for text in LOSS_SEEDS.values()]
        error = ""
        for _ in range(self._attempts):
            child = tidy(without_redundant(self._child(parents, rng)))
            if len(child.body) > (request.longest or LONGEST):
                error = f"it has {len(child.body)} statements"
                continue
            error = self._validate(child.text()) or ""
            if not error:
                return Proposal(child.text(), f"m_{child.digest[:8]}", "", self.name)
        raise ProposerError(f"{self._attempts} mutants of {len(parents)} parents were not valid, the last: {error}")

    def _child(self, parents: list[Genome], rng: np.random.Generator) -> Genome:
        one, two = (parents[k] for k in rng.integers(len(parents), size=2))
        child = joined(one, two, round(float(rng.uniform()), 3)) if rng.random() < self._join else one
        for _ in range(min(4, rng.geometric(0.5))):
            child = MUTATION.children(Genomes.of([child]), rng)[0]
        return child


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
