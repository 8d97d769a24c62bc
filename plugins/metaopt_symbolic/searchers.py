"""Where candidates come from: searchers that are asked for genomes and told how good they were.

All of them are functions of their arguments, of what they were told and of the generator they are handed: a search that goes on
from a checkpoint makes the candidates that it would have made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metaopt_symbolic.genome import Genome
from metaopt_symbolic.language import FUNCTIONS, INSERTED, NUMBER_OF
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes

MAX_LENGTH = 64
"""Statements of a candidate, the redundant ones included."""

Arrays = Mapping[str, NDArray[Any]]


class Searcher(Protocol):
    """A source of candidates, registered as a ``proposer``."""

    def begin(self, start: Genome, fitness: float) -> None:
        """The program to start from, and how good it is."""

    def ask(self, count: int, generator: np.random.Generator) -> tuple[Genomes, Genomes]:
        """Candidates, and the parent of each."""

    def tell(self, candidates: Genomes, fitness: NDArray[np.float64]) -> None:
        """How good they were, the larger the better; -inf for what cannot be run."""

    def welcome(self, genome: Genome, fitness: float) -> None:
        """A candidate of another searcher, which may serve as a parent from now on."""

    def state(self) -> dict[str, NDArray[Any]]:
        """What `restore` takes, after `begin` with the same arguments."""

    def restore(self, state: Arrays) -> None:
        """Go on as the searcher whose `state` this is."""


class Evolution:
    """Regularised evolution: a child of the best of a few random members replaces the oldest member.

    All members begin as the start. Where the best has not improved for ``patience`` candidates, they begin again: as the best
    so far, the next time as the start, and so on in turn. Real et al., 2019 (https://arxiv.org/abs/1802.01548); Chen et al.,
    2023 (https://arxiv.org/abs/2302.06675).

    Args:
        population: members.
        tournament: members that compete to be a parent.
        patience: candidates without improvement before a restart; 0: never.
        parsimony: fitness that a statement costs in tournaments; what gains less than it counts as no improvement.
        functions: what inserted statements may call (`INSERTED`): ``"paper"``; ``"all"``, with what traced rules need;
            ``"matrix"``, the paper's and functions of matrices; or ``"losses"``, what losses are made of.
        mutation: the other settings of `Mutation`, by name; what is not named is as in the paper.

    Raises:
        ValueError: a population below 2, a tournament outside [1, population], a negative patience or parsimony, other
            functions, or settings that `Mutation` has not.
    """

    def __init__(
        self,
        population: int = 1000,
        tournament: int = 2,
        patience: int = 0,
        parsimony: float = 0.0,
        functions: str = "paper",
        mutation: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if population < 2 or not 1 <= tournament <= population or patience < 0 or parsimony < 0:
            raise ValueError(
                f"population must be at least 2, tournament in [1, population], patience and parsimony at least 0, "
                f"got {population}, {tournament}, {patience} and {parsimony}"
            )
        known = {f.name for f in dataclasses.fields(Mutation)} - {"functions"}
        if unknown := set(mutation) - known:
            raise ValueError(f"mutation has the settings {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
        self._size, self._tournament, self._patience, self._parsimony = population, tournament, patience, parsimony
        self._mutation = Mutation(functions=_inserted(functions), **mutation)

    def begin(self, start: Genome, fitness: float) -> None:
        """See `Searcher.begin`."""
        self._start = self._best = Genomes.of([start], MAX_LENGTH), fitness
        self._fill(*self._start)
        self._waited, self._restarts = 0, 0

    def _fill(self, genome: Genomes, fitness: float) -> None:
        self._members = genome.select(np.zeros(self._size, np.int64))
        self._fitness = np.full(self._size, fitness)
        self._oldest = 0

    def ask(self, count: int, generator: np.random.Generator) -> tuple[Genomes, Genomes]:
        """See `Searcher.ask`; at most half the population at once, else a generation would be its own parents."""
        parents = self._members.select(self._chosen(count, generator))
        return self._mutation.children(parents, generator), parents

    def _chosen(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """The winners of tournaments."""
        if 2 * count > self._size:
            raise ValueError(
                f"a population of {self._size} can be asked for at most {self._size // 2} children, got {count}"
            )
        drawn = generator.integers(self._size, size=(count, self._tournament))
        merit = self._fitness - self._parsimony * self._members.lengths
        chosen: NDArray[np.int64] = drawn[np.arange(count), merit[drawn].argmax(1)]
        return chosen

    def tell(self, candidates: Genomes, fitness: NDArray[np.float64]) -> None:
        """See `Searcher.tell`."""
        places = (self._oldest + np.arange(len(fitness))) % self._size
        self._members.put(places, candidates)
        self._fitness[places] = fitness
        self._oldest = int((self._oldest + len(fitness)) % self._size)
        self._waited += len(fitness)
        k = int(fitness.argmax())
        if fitness[k] > self._best[1]:
            if fitness[k] > self._best[1] + self._parsimony:
                self._waited = 0
            self._best = candidates.select(np.array([k])), float(fitness[k])
        if self._patience and self._waited >= self._patience:
            self._restarts, self._waited = self._restarts + 1, 0
            self._fill(*(self._best if self._restarts % 2 else self._start))

    @property
    def best(self) -> tuple[Genome, float]:
        """The best that it was told of, the start if none was better."""
        return self._best[0][0], self._best[1]

    def welcome(self, genome: Genome, fitness: float) -> None:
        """See `Searcher.welcome`; takes the place of the oldest member, with the slots that it has lost."""
        v = self._members.variables
        whole = Genome(v.tensors, v.scalars, v.outputs, genome.body)
        self.tell(Genomes.of([whole], MAX_LENGTH, v), np.array([fitness]))

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Searcher.state`."""
        best, fitness = self._best
        return {
            **{f"members.{k}": v for k, v in _arrays(self._members).items()},
            **{f"best.{k}": v for k, v in _arrays(best).items()},
            "fitness": self._fitness.copy(),
            "best_fitness": np.array(fitness),
            "counts": np.array([self._oldest, self._waited, self._restarts]),
        }

    def restore(self, state: Arrays) -> None:
        """See `Searcher.restore`."""
        self._members = _genomes(self._members, state, "members.")
        self._best = _genomes(self._start[0], state, "best."), float(state["best_fitness"])
        self._fitness = state["fitness"].copy()
        self._oldest, self._waited, self._restarts = state["counts"].tolist()


class Islands:
    """Populations that evolve apart, asked in turn; now and then the best of each joins the next one.

    Args:
        islands: how many.
        migrate_every: generations of an island between two migrations.
        **options: of each `Evolution`.

    Raises:
        ValueError: fewer than two islands, or an interval below 1.
    """

    def __init__(self, islands: int = 4, migrate_every: int = 20, **options: Any) -> None:
        if islands < 2 or migrate_every < 1:
            raise ValueError(
                f"islands must be at least 2 and migrate_every at least 1, got {islands} and {migrate_every}"
            )
        self._islands = [Evolution(**options) for _ in range(islands)]
        self._every, self._asked = migrate_every, 0

    def begin(self, start: Genome, fitness: float) -> None:
        """See `Searcher.begin`."""
        for island in self._islands:
            island.begin(start, fitness)
        self._asked = 0

    def ask(self, count: int, generator: np.random.Generator) -> tuple[Genomes, Genomes]:
        """See `Searcher.ask`."""
        return self._islands[self._asked % len(self._islands)].ask(count, generator)

    def tell(self, candidates: Genomes, fitness: NDArray[np.float64]) -> None:
        """See `Searcher.tell`."""
        self._islands[self._asked % len(self._islands)].tell(candidates, fitness)
        self._asked += 1
        if self._asked % (self._every * len(self._islands)) == 0:
            bests = [island.best for island in self._islands]
            for k, best in enumerate(bests):
                self._islands[(k + 1) % len(bests)].welcome(*best)

    def welcome(self, genome: Genome, fitness: float) -> None:
        """See `Searcher.welcome`; joins the island that is asked next."""
        self._islands[self._asked % len(self._islands)].welcome(genome, fitness)

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Searcher.state`."""
        own = {f"{k}.{key}": v for k, island in enumerate(self._islands) for key, v in island.state().items()}
        return {**own, "asked": np.array(self._asked)}

    def restore(self, state: Arrays) -> None:
        """See `Searcher.restore`."""
        for k, island in enumerate(self._islands):
            island.restore(_under(state, f"{k}."))
        self._asked = int(state["asked"])


class RandomSearch:
    """The control without selection: the start, mutated a random number of times.

    Args:
        most: mutations of a candidate, at most.
        functions: as of `Evolution`.

    Raises:
        ValueError: fewer than one mutation, or other functions.
    """

    def __init__(self, most: int = 12, functions: str = "paper") -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self._most = most
        self._mutation = Mutation(functions=_inserted(functions))

    def begin(self, start: Genome, fitness: float) -> None:
        """See `Searcher.begin`."""
        self._start = Genomes.of([start], MAX_LENGTH)

    def ask(self, count: int, generator: np.random.Generator) -> tuple[Genomes, Genomes]:
        """See `Searcher.ask`."""
        parents = self._start.select(np.zeros(count, np.int64))
        children, left = parents, generator.integers(1, self._most + 1, count)
        while (rows := np.flatnonzero(left > 0)).size:
            mutated = self._mutation.children(children.select(rows), generator)
            children = children.select(np.arange(count))
            children.put(rows, mutated)
            left[rows] -= 1
        return children, parents

    def tell(self, candidates: Genomes, fitness: NDArray[np.float64]) -> None:
        """Nothing is learnt."""

    def welcome(self, genome: Genome, fitness: float) -> None:
        """Nothing is learnt."""

    def state(self) -> dict[str, NDArray[Any]]:
        """There is none."""
        return {}

    def restore(self, state: Arrays) -> None:
        """There is none."""


class Policy(Evolution):
    """A learned policy: evolution whose inserted statements call what the statements of the best members call.

    At every generation the distribution of functions is learnt anew from the best quarter of the members, and mixed with the
    uniform one: an estimation-of-distribution algorithm (PBIL; Baluja, 1994, CMU-CS-94-163).

    Args:
        uniform: share of the uniform distribution, in (0, 1].
        **options: of the `Evolution`.
    """

    def __init__(self, uniform: float = 0.3, **options: Any) -> None:
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1], got {uniform}")
        super().__init__(**options)
        self._uniform, self._usual = uniform, self._mutation

    def ask(self, count: int, generator: np.random.Generator) -> tuple[Genomes, Genomes]:
        """See `Searcher.ask`."""
        best = self._members.select(np.argsort(-self._fitness, kind="stable")[: self._size // 4 + 1])
        within = np.arange(best.max_length) < best.lengths[:, None]
        called = np.bincount(best.functions[within], minlength=len(FUNCTIONS))
        names = self._usual.functions
        learnt = called[[NUMBER_OF[name] for name in names]]
        share = (1 - self._uniform) * learnt / max(1, learnt.sum()) + self._uniform / len(names)
        tickets = np.repeat(names, np.rint(share * _TICKETS).astype(np.int64))
        self._mutation = dataclasses.replace(self._usual, functions=(*map(str, tickets),))
        return super().ask(count, generator)


_TICKETS = 10_000
"""A mutation draws functions evenly from a list; one that shall be drawn more often is on it more often."""


def _inserted(functions: str) -> tuple[str, ...]:
    if functions not in INSERTED:
        raise ValueError(f"functions must be one of {', '.join(INSERTED)}, got {functions!r}")
    return INSERTED[functions]


_ARRAYS = ("functions", "targets", "args", "constants", "lengths")


def _arrays(genomes: Genomes) -> dict[str, NDArray[Any]]:
    return {name: getattr(genomes, name).copy() for name in _ARRAYS}


def _genomes(like: Genomes, state: Arrays, prefix: str) -> Genomes:
    return Genomes(like.variables, *(state[prefix + name].copy() for name in _ARRAYS))


def _under(state: Arrays, prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
