"""Rules from rules: mutated."""

from __future__ import annotations

import numpy as np

from metaopt.search import Validator
from metaopt_symbolic.analysis import without_redundant
from metaopt_symbolic.genome import SEEDS, Genome
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.proposals.mutator import Mutator

MUTATION = Mutation(
    tune=0.5, splice=0.5, duplicate=0.3, scales=(1.0, 0.1, 0.01), complement=0.5
)  # of the searcher `effective`
LONGEST = 40
"""Statements of a candidate, unless the request says fewer."""


class RuleMutator(Mutator):
    """Mutates a parent one to four times, by the paper's functions.

    Args:
        validate: as of `Mutator`.
        seed: as of `Mutator`.
        attempts: as of `Mutator`.
        name: as of `Mutator`.
    """

    def __init__(self, validate: Validator, seed: int = 0, attempts: int = 64, name: str = "mutator") -> None:
        super().__init__(validate, MUTATION, SEEDS, LONGEST, seed, attempts, name)

    def child(self, parents: list[Genome], rng: np.random.Generator) -> Genome:
        """See the class."""
        return without_redundant(self.mutated(parents[rng.integers(len(parents))], rng))
