"""The search: ask for candidates, find what is known of them, train the rest, tell, remember.

What is known is looked up twice before anything is trained: by the structural hash of a candidate (`analyse`), and by what it
does on two probes (`fingerprint`). Of the paper's programs 89 % were known by hash alone.

A search lives in a directory: ``worker-K.npz`` is what worker K goes on from, bit for bit; ``study.log`` is the archive of
elites, which workers share.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.interruptions import interruptions
from metaopt.program.program import Program
from metaopt.search import Archive, Elite
from metaopt_symbolic.analysis import Analysis, analyse, live_part, without_redundant
from metaopt_symbolic.cascade import Score
from metaopt_symbolic.fingerprint import fingerprint
from metaopt_symbolic.genome import Genome, parse
from metaopt_symbolic.population import Genomes
from metaopt_symbolic.searchers import Searcher

STUDY = "discover-rule"
WINDOW = 1000
"""Children between two rows of the history."""


class Judge(Protocol):
    """What says how good programs are: `metaopt_symbolic.cascade.Cascade`."""

    def scores(self, programs: Sequence[Program]) -> list[Score]:
        """One score per program."""

    def state(self) -> dict[str, Any]:
        """What `restore` takes, as JSON holds it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the judge whose `state` this is."""


@dataclass(frozen=True)
class Budget:
    """When to stop, whichever comes first; what is None does not count. All of them include what was done before a resume.

    Attributes:
        seconds: of wall-clock.
        children: candidates, known ones included.
        unique: candidates that were trained.
    """

    seconds: float | None = None
    children: int | None = None
    unique: int | None = None

    @classmethod
    def of(cls, text: str) -> Budget:
        """``20m``, ``2h`` or ``90s`` of time, or a number of children such as ``50000``.

        Raises:
            ValueError: anything else.
        """
        units = {"s": 1, "m": 60, "h": 3600}
        try:
            if text[-1:] in units:
                seconds = float(text[:-1]) * units[text[-1]]
                if seconds > 0 and math.isfinite(seconds):
                    return cls(seconds=seconds)
            elif int(text) > 0:
                return cls(children=int(text))
        except ValueError:
            pass
        raise ValueError(f"a budget is a time above 0 such as 90s, 20m or 2h, or a number above 0, got {text!r}")

    def is_spent(self, counts: Counts) -> bool:
        """Whether to stop."""
        pairs = ((self.seconds, counts.seconds), (self.children, counts.children), (self.unique, counts.unique))
        return any(most is not None and spent >= most for most, spent in pairs)


@dataclass
class Counts:
    """What a search has done.

    Attributes:
        generations: calls of the searcher.
        children: candidates.
        by_hash, by_behaviour: children that were known by structure, and by what they do.
        not_finite: children whose updates are no numbers on the probes.
        inert: children whose updates do not depend on the gradient.
        unique: children that were trained.
        diverged: unique children all of whose runs diverged.
        updates: inner steps planned for the unique ones.
        redundant: sum of the shares of redundant statements of all children.
        seconds: wall-clock.
    """

    generations: int = 0
    children: int = 0
    by_hash: int = 0
    by_behaviour: int = 0
    not_finite: int = 0
    inert: int = 0
    unique: int = 0
    diverged: int = 0
    updates: int = 0
    redundant: float = 0.0
    seconds: float = 0.0

    def since(self, before: Counts) -> Counts:
        """What was done after ``before``."""
        return Counts(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in dataclasses.fields(self)})

    @property
    def hits(self) -> float:
        """Share of children that were not trained because they were known."""
        return (self.by_hash + self.by_behaviour) / max(1, self.children)

    @property
    def redundancy(self) -> float:
        """Mean share of redundant statements."""
        return self.redundant / max(1, self.children)


@dataclass(frozen=True)
class Candidate:
    """A trained candidate.

    Attributes:
        genome: without redundant statements.
        score: of the judge.
        parent: digest of what it was mutated from.
        generation: when.
    """

    genome: Genome
    score: Score
    parent: str
    generation: int

    @property
    def tuned(self) -> Genome:
        """With the learning rate that the score is of."""
        return self.genome if self.score.multiplier == 1 else self.genome.scaled(self.score.multiplier)


class Row(TypedDict):
    """What the history says every thousand children.

    Attributes:
        counts: `Counts` so far.
        hits, redundancy: of the children since the last row.
        best: fitness.
    """

    counts: dict[str, Any]
    hits: float
    redundancy: float
    best: float


@dataclass(frozen=True)
class SearchConfig:
    """What makes a search the search that it is.

    Attributes:
        start: text of the program to start from.
        searcher: name of a registered proposer.
        options: of the searcher.
        judge: what candidates are scored by, as far as words can say it; searches with others do not mix.
        batch: children of a generation.
        elites: how many of the best candidates are archived, at most at a time.
        migrate_every: generations after which a worker takes in the best of the others.
        seed: of everything random; workers add their numbers.
    """

    start: str
    searcher: str = "evolution"
    options: Mapping[str, Any] = field(default_factory=dict)
    judge: str = ""
    batch: int = 100
    elites: int = 20
    migrate_every: int = 20
    seed: int = 0


class Search:
    """A search in a directory; making it again goes on with what is there.

    Args:
        config: of the search.
        judge: fresh.
        directory: of its files.
        storage: URL of an Optuna storage for the archive; by default a journal file in ``directory``.
        worker: number of this process among those that share the archive.

    Attributes:
        counts, history: what was done.
        best: the elites, the best first.
        start_fitness: of the start.

    Raises:
        ValueError: the directory holds a search with another config; or the start has no finite fitness.
    """

    def __init__(
        self, config: SearchConfig, judge: Judge, directory: Path | str, storage: str | None = None, worker: int = 0
    ) -> None:
        self.config, self.worker = config, worker
        self.directory = Path(directory)
        self.archive = Archive(self.directory, STUDY, dataclasses.asdict(config), storage)
        self.counts, self.history = Counts(), list[Row]()
        self.best: list[Candidate] = []
        self._judge = judge
        self._rng = np.random.default_rng([config.seed, worker])
        self._fitness: dict[int, float] = {}
        self._behaviours: dict[tuple[int, int], int] = {}
        self._searcher: Searcher = registry.create("proposer", config.searcher, **config.options)
        self._welcomed: set[str] = set()
        self._start = parse(config.start)
        state = self._load()
        if state is None:
            self._begin(self._first_fitness())
        else:
            self._begin(float(state["start_fitness"]))
            self._restore(state)

    def _begin(self, fitness: float) -> None:
        self.start_fitness = fitness
        self._searcher.begin(self._start, fitness)

    def _first_fitness(self) -> float:
        (score,) = self._judge.scores([self._start.program()])
        if not math.isfinite(score.fitness):
            raise ValueError("the program to start from diverges on the tasks; choose another start or other tasks")
        start = Genomes.of([self._start])
        behaviour = fingerprint([self._start.program()]).hashes[0]
        self._remember(int(analyse(start).hashes[0]), behaviour, score.fitness)
        self._keep([Candidate(without_redundant(self._start), score, "", 0)])
        return score.fitness

    @property
    def champion(self) -> Candidate:
        """The best candidate so far, among those that went through all stages if there are any."""
        return self.best[0]

    # -- running ---------------------------------------------------------------------------------------------------

    def run(
        self,
        budget: Budget,
        *,
        on_generation: Callable[[Search], None] = lambda search: None,
        save_every: float = 30.0,
    ) -> Candidate:
        """Go on until the budget is spent; returns the champion.

        Ctrl-C ends it after the generation at hand, with everything saved.

        Args:
            budget: of the whole search.
            on_generation: called after each.
            save_every: seconds between two checkpoints.

        Raises:
            KeyboardInterrupt: after the checkpoint.
        """
        saved = began = time.monotonic()
        before = self.counts.seconds
        with interruptions() as interrupted:
            while not budget.is_spent(self.counts) and not interrupted:
                self._generation()
                now = time.monotonic()
                self.counts.seconds = before + now - began
                on_generation(self)
                if now - saved > save_every:
                    self.save()
                    saved = now
        self.save()
        if interrupted:
            raise KeyboardInterrupt
        return self.champion

    def _generation(self) -> None:
        counts, earlier = self.counts, self.counts.children // WINDOW
        children, parents = self._searcher.ask(self.config.batch, self._rng)
        found = analyse(children)
        hashes = [int(h) for h in found.hashes]
        counts.generations += 1
        counts.children += len(hashes)
        counts.redundant += float(found.redundant.sum())
        firsts = {h: k for k, h in reversed([*enumerate(hashes)]) if h not in self._fitness}
        rows = sorted(firsts.values())
        counts.by_hash += len(hashes) - len(rows)
        self._train(children, parents, rows, found)
        self._searcher.tell(children, np.array([self._fitness[h] for h in hashes]))
        if counts.generations % self.config.migrate_every == 0:
            self._migrate()
        if counts.children // WINDOW > earlier:
            self._write_row()

    def _train(self, children: Genomes, parents: Genomes, rows: Sequence[int], analysis: Analysis) -> None:
        """Give the fitness of the children ``rows``, whose structure is new."""
        counts, hashes = self.counts, analysis.hashes.tolist()
        shown = [live_part(children[k], analysis, k) for k in rows]
        programs = [genome.program() for genome in shown]
        prints = fingerprint(programs)
        fresh: list[int] = []
        fresh_prints: dict[tuple[int, int], int] = {}
        same: list[tuple[int, int]] = []
        for i, k in enumerate(rows):
            behaviour = _pair(prints.hashes[i])
            if not prints.finite[i]:
                counts.not_finite += 1
                self._fitness[hashes[k]] = -math.inf
            elif not prints.uses_gradient[i]:
                counts.inert += 1
                self._fitness[hashes[k]] = -math.inf
            elif behaviour in self._behaviours:
                counts.by_behaviour += 1
                self._fitness[hashes[k]] = self._fitness[self._behaviours[behaviour]]
            elif behaviour in fresh_prints:
                counts.by_behaviour += 1
                same.append((hashes[k], fresh_prints[behaviour]))
            else:
                fresh_prints[behaviour] = hashes[k]
                fresh.append(i)
        scores = self._judge.scores([programs[i] for i in fresh])
        found = []
        for i, score in zip(fresh, scores, strict=True):
            k = rows[i]
            counts.unique += 1
            counts.updates += score.updates
            counts.diverged += score.diverged == 1
            self._remember(hashes[k], prints.hashes[i], score.fitness)
            if math.isfinite(score.fitness):
                found.append(Candidate(shown[i], score, parents[k].digest, counts.generations))
        for own, other in same:
            self._fitness[own] = self._fitness[other]
        self._keep(found)

    def _remember(self, structure: int, behaviour: NDArray[np.uint64], fitness: float) -> None:
        self._fitness[structure] = fitness
        self._behaviours[_pair(behaviour)] = structure

    def _keep(self, found: Sequence[Candidate]) -> None:
        """Make the best of them elites."""
        merged = sorted([*self.best, *found], key=lambda c: -c.score.fitness)[: self.config.elites]
        new = [c for c in merged if any(c is other for other in found)]
        self.best = merged
        for c in new:
            self.archive.add(
                Elite(
                    c.genome.digest, c.genome.text(), -c.score.fitness, dict(c.score.losses), self.worker, c.generation,
                    (c.parent,) if c.parent else (), {"stage": c.score.stage, "multiplier": c.score.multiplier},
                )
            )  # fmt: skip

    def _migrate(self) -> None:
        """Take in the best elite of every other worker that is better than ours."""
        for elite in self.archive.best_of_others(self.worker):
            if elite.digest not in self._welcomed and -elite.score > self._own_best:
                self._searcher.welcome(parse(elite.text), -elite.score)
                self._welcomed.add(elite.digest)

    @property
    def _own_best(self) -> float:
        return self.champion.score.fitness

    def _write_row(self) -> None:
        window = self.counts.since(Counts(**self.history[-1]["counts"]) if self.history else Counts())
        counts = dataclasses.asdict(self.counts)
        self.history.append(
            {"counts": counts, "hits": window.hits, "redundancy": window.redundancy, "best": self._own_best}
        )

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.directory / f"worker-{self.worker}.npz"

    def save(self) -> None:
        """Write the checkpoint."""
        facts = {
            "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            "start_fitness": self.start_fitness,
            "counts": dataclasses.asdict(self.counts),
            "history": self.history,
            "rng": self._rng.bit_generator.state,
            "judge": self._judge.state(),
            "welcomed": sorted(self._welcomed),
            "best": [
                {
                    "text": c.genome.text(),
                    "score": dataclasses.asdict(c.score),
                    "parent": c.parent,
                    "generation": c.generation,
                }
                for c in self.best
            ],
        }
        arrays = {f"searcher.{key}": value for key, value in self._searcher.state().items()}
        arrays["hashes"] = np.array([*self._fitness], np.uint64)
        arrays["fitness"] = np.array([*self._fitness.values()])
        arrays["behaviours"] = np.array([*self._behaviours], np.uint64).reshape(-1, 2)
        arrays["of_behaviours"] = np.array([*self._behaviours.values()], np.uint64)
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        write_atomic(self._file, lambda path: np.savez_compressed(path, **arrays))  # type: ignore[arg-type]

    def _load(self) -> dict[str, Any] | None:
        if not self._file.is_file():
            return None
        with np.load(self._file, allow_pickle=False) as stored:
            state = {key: stored[key] for key in stored.files}
        return {**state, **json.loads(state["facts"].tobytes())}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.counts, self.history = Counts(**state["counts"]), state["history"]
        self._rng.bit_generator.state = state["rng"]
        self._judge.restore(state["judge"])
        self._welcomed = {*state["welcomed"]}
        self.best = [
            Candidate(parse(c["text"]), Score(**c["score"]), c["parent"], c["generation"]) for c in state["best"]
        ]
        self._fitness = dict(zip(state["hashes"].tolist(), state["fitness"].tolist(), strict=True))
        pairs = map(tuple, state["behaviours"].tolist())
        self._behaviours = dict(zip(pairs, state["of_behaviours"].tolist(), strict=True))
        prefix = "searcher."
        self._searcher.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _pair(behaviour: NDArray[np.uint64]) -> tuple[int, int]:
    first, second = behaviour.tolist()
    return first, second
