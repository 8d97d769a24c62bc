"""Proposers that need no server: they mutate what they are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from metaopt.search import Proposal, ProposerError, Request, Validator
from metaopt_symbolic.genome import Genome, parse
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes


class Mutator(ABC):
    """Proposes children of the parents in a request.

    A proposal is a function of the request and the seed alone, so that a search that goes on proposes the same.

    Args:
        validate: what is wrong with a candidate.
        mutation: how children differ.
        starts: programs that are parents where a request shows none.
        longest: statements of a candidate, unless the request says fewer.
        seed: of the mutations.
        attempts: children that are tried until one is valid.
        name: of the proposer.

    Raises:
        ValueError: no attempts.
    """

    def __init__(
        self,
        validate: Validator,
        mutation: Mutation,
        starts: Mapping[str, str],
        longest: int,
        seed: int = 0,
        attempts: int = 64,
        name: str = "mutator",
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self.name = name
        self._validate, self._mutation, self._starts, self._longest = validate, mutation, starts, longest
        self._seed, self._attempts = seed, attempts

    def propose(self, request: Request) -> Proposal:
        """A valid candidate; of parents that are no programs, none of them has children.

        Raises:
            ProposerError: none of the attempts was valid.
        """
        rng = np.random.default_rng([self._seed, request.number])
        shown = request.parents or request.elites
        parents = [parse(elite.facts["program"]) for elite in shown] or [parse(text) for text in self._starts.values()]
        error = ""
        for _ in range(self._attempts):
            child = self.child(parents, rng)
            if len(child.body) > (request.longest or self._longest):
                error = f"it has {len(child.body)} statements"
                continue
            error = self._validate(child.text()) or ""
            if not error:
                return Proposal(child.text(), f"m_{child.digest[:8]}", "", self.name)
        raise ProposerError(f"{self._attempts} mutants of {len(parents)} parents were not valid, the last: {error}")

    @abstractmethod
    def child(self, parents: list[Genome], rng: np.random.Generator) -> Genome:
        """A child of some of the parents, without what does nothing."""

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """The genome after one to four mutations, one half of the time, two a quarter, and so on."""
        for _ in range(min(4, rng.geometric(0.5))):
            genome = self._mutation.children(Genomes.of([genome]), rng)[0]
        return genome
