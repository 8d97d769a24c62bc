"""What a search by proposers finds: candidates, how good they are, and what of a text is valid and new."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from metaopt.program.program import Program
from metaopt.search import Elite, Proposal
from metaopt_symbolic.fingerprint import fingerprint
from metaopt_symbolic.genome import Genome, parse

Behaviour = tuple[int, int]
"""The fingerprint of what a candidate does: equal ones train alike."""

SAME = "it computes the same as"
"""How the error of a valid candidate begins that is not new."""


def behaviour_of(program: Program, *, not_finite: str, inert: str) -> Behaviour:
    """What a program does on the probes of `fingerprint`.

    Args:
        program: of a rule or a loss.
        not_finite: what its author is told where something is no finite number.
        inert: and where nothing depends on the gradient, of a loss on its input.

    Raises:
        ValueError: one of these.
    """
    shown = fingerprint([program])
    if not shown.finite[0]:
        raise ValueError(not_finite)
    if not shown.uses_gradient[0]:
        raise ValueError(inert)
    first, second = shown.hashes[0].tolist()
    return first, second


@dataclass(frozen=True)
class CandidateScore:
    """How good a candidate is; kinds of candidates add what else is known of it.

    Attributes:
        loss: the smaller the better; finite.
        stage: of the judge, the last one that was run, from 0.
        losses: of that stage, by task.
    """

    loss: float
    stage: int
    losses: Mapping[str, float]

    @property
    def fault(self) -> str:
        """What its author should know of its training, in words; empty: nothing."""
        return ""

    @property
    def text(self) -> str:
        """The loss, as tables have it."""
        return f"{self.loss:.4f}"

    def facts(self) -> dict[str, Any]:
        """What `of_elite` needs beside ``loss`` and ``losses``, as JSON holds it: finite numbers alone."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name not in ("loss", "losses") and math.isfinite(value := getattr(self, field.name))
        }

    @classmethod
    def of_elite(cls, elite: Elite) -> Self:
        """The score that an elite of the archive had; what is not among its facts was not finite."""
        own = {field.name: elite.facts.get(field.name, math.nan) for field in dataclasses.fields(cls)}
        return cls(**{**own, "loss": elite.score, "losses": elite.scores})


S = TypeVar("S", bound=CandidateScore)


@dataclass(frozen=True)
class Candidate(Generic[S]):
    """A candidate that was trained.

    Attributes:
        number: of the candidate; the start has the first ones.
        name: what its author calls it.
        source: Python or JSON, as it was written.
        genome: the same as a program of the search.
        score: of the judge.
        parents: numbers of what its author was shown to start from.
        proposal: whence it is; None for the start.
        round: when.
    """

    number: int
    name: str
    source: str
    genome: Genome
    score: S
    parents: tuple[int, ...] = ()
    proposal: Proposal | None = None
    round: int = 0

    @property
    def digest(self) -> str:
        """Of the program."""
        return self.genome.digest

    def elite(self, worker: int) -> Elite:
        """As archives and proposers have it; ``text`` is what a reader wants to see."""
        facts = {"name": self.name, "program": self.genome.text(), "number": self.number, **self.score.facts()}
        if self.proposal is not None:
            told = dataclasses.asdict(self.proposal)
            facts |= {key: told[key] for key in ("proposer", "model", "thought", "tokens", "cost")}
        parents = tuple(str(number) for number in self.parents)
        return Elite(
            self.digest, self.source, self.score.loss, dict(self.score.losses), worker, self.round, parents, facts
        )

    def to_json(self) -> dict[str, Any]:
        """What `CandidateValidator.candidate` takes."""
        return {**dataclasses.asdict(self), "genome": self.genome.text(), "score": dataclasses.asdict(self.score)}


class CandidateValidator(ABC, Generic[S]):
    """Candidates of one kind: reads, checks and prints them; what is wrong with a source it says to its author.

    It is the `metaopt.search.Validator` of the search's proposers.

    Attributes:
        study: name of the archive.
        measure: what their loss is, in words.
        language: name of the template that describes the texts to language models.
        score: class of their scores.
        known: names of what may not be proposed again, by what it does.
    """

    study: ClassVar[str]
    measure: ClassVar[str]
    language: ClassVar[str]
    score: type[S]

    def __init__(self) -> None:
        self.known: dict[Behaviour, str] = {}

    @abstractmethod
    def read(self, source: str) -> Genome:
        """A candidate as a genome, without what does nothing.

        Raises:
            ValueError: ``source`` is none.
        """

    @abstractmethod
    def behaviour(self, genome: Genome) -> Behaviour:
        """What a candidate does, after all checks that come before training but whether it is new.

        Raises:
            ValueError: a candidate that cannot be trained, with the reason for its author.
        """

    @abstractmethod
    def python(self, genome: Genome) -> str:
        """Text that `read` takes, as proposers are shown it."""

    @abstractmethod
    def trained(self, genome: Genome) -> Any:
        """What the judge takes."""

    def __call__(self, source: str) -> str | None:
        try:
            self._new(self.read(source))
        except ValueError as error:
            return str(error)
        return None

    def remember(self, genome: Genome, name: str) -> None:
        """Let nothing be proposed that does the same.

        Raises:
            ValueError: a candidate that is not valid, or does what another one does.
        """
        self.known[self._new(genome)] = name

    def _new(self, genome: Genome) -> Behaviour:
        done = self.behaviour(genome)
        if done in self.known:
            raise ValueError(f"{SAME} {self.known[done]}; propose something else")
        return done

    def candidate(self, data: Mapping[str, Any]) -> Candidate[S]:
        """The one whose `Candidate.to_json` this is."""
        proposal = data["proposal"] and Proposal(**data["proposal"])
        read = {
            "genome": parse(data["genome"]),
            "score": self.score(**data["score"]),
            "parents": tuple(data["parents"]),
        }
        return Candidate(**{**data, **read, "proposal": proposal})

    def guest(self, elite: Elite, number: int, round_: int) -> Candidate[S]:
        """The candidate of another worker, as one of ours without parents."""
        facts = elite.facts
        told = Proposal(elite.text, facts["name"], facts.get("thought", ""), f"worker {elite.worker}")
        genome, score = parse(facts["program"]), self.score.of_elite(elite)
        return Candidate(number, told.name, told.source, genome, score, (), told, round_)

    def load(self, directory: Path, worker: int = 0) -> list[Candidate[S]]:
        """The candidates of a worker of the search in ``directory``, by number.

        Raises:
            ValueError: there is no search, or one for something else.
        """
        study = study_of(directory, worker)
        if study != self.study:
            raise ValueError(f"{directory} holds a search of the kind {study}, not {self.study}")
        state = json.loads(state_file(directory, worker).read_text())
        return [self.candidate(data) for data in state["candidates"]]


def state_file(directory: Path, worker: int) -> Path:
    """What worker ``worker`` of the search in ``directory`` goes on from."""
    return directory / f"worker-{worker}.json"


def study_of(directory: Path, worker: int = 0) -> str:
    """The kind of the search in ``directory``: `CandidateValidator.study`.

    Raises:
        ValueError: there is no search by proposers.
    """
    file = state_file(directory, worker)
    if not file.is_file():
        raise ValueError(
            f"{directory} holds no search by proposers; make one with metaopt discover loss --out {directory}, or with "
            "metaopt discover rule --proposer"
        )
    return str(json.loads(file.read_text())["study"])


def workers(directory: Path) -> list[int]:
    """Numbers of those that searched in ``directory``."""
    return sorted(int(file.stem.removeprefix("worker-")) for file in directory.glob("worker-*.json"))
