"""The search loop: propose, validate, evaluate, archive, tell.

A search lives in a directory: ``worker-K.json`` is what worker K goes on from, ``study.log`` the archive, which workers share.
Requests are written down before they are made, with the candidates that wait to be trained with. So a search that is killed
asks the same again, gets from the ledger of its proposers what it has paid for, and comes to the same champion.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.files import write_atomic
from metaopt.search import Archive, Elite, Mixture, Proposal, Proposer, ProposerError, Request
from metaopt_symbolic.genome import LOSS_SEEDS, Genome, parse
from metaopt_symbolic.interruptions import interruptions
from metaopt_symbolic.losses.candidate import SAME, LossValidator, behaviour, objective, python, read
from metaopt_symbolic.losses.islands import Islands, Member
from metaopt_symbolic.losses.judge import Judge, Score, Stage

STUDY = "discover-loss"
REQUESTS = 1_000_000
"""More than one worker makes: by its number, no request is like one of another worker."""
PATIENCE = 5
"""Rounds without a new candidate after which a search ends: what proposes nothing else will not for more money."""
NOTES = 5
"""How many of the latest errors proposers see."""


@dataclass(frozen=True)
class LoopConfig:
    """What makes a search the search that it is.

    Attributes:
        goal: of the candidates, in words for proposers.
        proposers: names of those that take part.
        judge: `Judge.describe`.
        start: programs of the search language that every island begins with, by name.
        batch: requests of a round, answered at the same time and trained with together.
        ahead: whether a round is asked for while the one before is trained with, so that nobody waits for a server that
            thinks. What proposers see is then a round older.
        parents, examples: how many candidates of an island, and of all, a proposer is shown.
        longest: statements of a candidate.
        islands: options of `Islands`.
        migrate_every: rounds after which a worker takes in the best of the others.
        seed: of everything random.
    """

    goal: str
    proposers: tuple[str, ...]
    judge: Sequence[Mapping[str, Any]]
    start: Mapping[str, str] = field(default_factory=lambda: dict(LOSS_SEEDS))
    batch: int = 16
    ahead: bool = False
    parents: int = 2
    examples: int = 6
    longest: int = 20
    islands: Mapping[str, Any] = field(default_factory=dict)
    migrate_every: int = 4
    seed: int = 0


@dataclass
class LoopCounts:
    """What a search has done.

    Attributes:
        rounds: of requests.
        proposed: answers.
        invalid: answers that could not be mended.
        known: valid answers that do what another candidate does.
        unreadable: answers without a candidate: refusals, cut off, of another form.
        failed: requests without an answer.
        evaluated: candidates that were trained with, the start not included.
        full: of these, those that reached the last stage.
        tokens, cost: of language models.
        seconds: wall-clock.
    """

    rounds: int = 0
    proposed: int = 0
    invalid: int = 0
    known: int = 0
    unreadable: int = 0
    failed: int = 0
    evaluated: int = 0
    full: int = 0
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A loss that was evaluated.

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
    score: Score
    parents: tuple[int, ...] = ()
    proposal: Proposal | None = None
    round: int = 0

    @property
    def digest(self) -> str:
        """Of the program."""
        return self.genome.digest

    def elite(self, worker: int) -> Elite:
        """As archives and proposers have it; ``text`` is what a reader wants to see."""
        facts: dict[str, Any] = {
            "name": self.name, "program": self.genome.text(), "stage": self.score.stage, "scale": self.score.scale,
            "rate": self.score.rate, "number": self.number,
        }  # fmt: skip
        if math.isfinite(self.score.low):
            facts["interval"] = [self.score.low, self.score.high]
        if self.proposal is not None:
            told = dataclasses.asdict(self.proposal)
            facts |= {key: told[key] for key in ("proposer", "model", "thought", "tokens", "cost")}
        parents = tuple(str(number) for number in self.parents)
        return Elite(
            self.digest, self.source, self.score.loss, dict(self.score.losses), worker, self.round, parents, facts
        )


class Loop:
    """A search in a directory; making it again goes on with what is there.

    Args:
        config: of the search.
        judge: fresh.
        proposer: of candidates; a `metaopt.search.Mixture` is told what they were worth.
        validator: the one that proposers validate with.
        directory: of its files.
        storage: URL of an Optuna storage for the archive; by default a journal file in ``directory``.
        worker: number of this process among those that share the archive.

    Attributes:
        counts: what was done.
        candidates: all that were evaluated, by number.
        errors: of what could not be mended: proposer, name, source and error each.

    Raises:
        ValueError: the directory holds a search with another config, or a program of the start is not valid.
    """

    def __init__(
        self,
        config: LoopConfig,
        judge: Judge,
        proposer: Proposer,
        validator: LossValidator,
        directory: Path | str,
        storage: str | None = None,
        worker: int = 0,
    ) -> None:
        self.config, self.directory, self.worker = config, Path(directory), worker
        self.archive = Archive(self.directory, STUDY, dataclasses.asdict(config), storage)
        self.counts, self.candidates, self.errors = LoopCounts(), list[Candidate](), list[dict[str, str]]()
        self._judge, self._proposer, self._validator = judge, proposer, validator
        self._islands = Islands(**config.islands)
        self._requests: list[Request] = []
        self._waiting: list[tuple[Request, Proposal]] = []
        if self._file.is_file():
            self._restore(json.loads(self._file.read_text()))
        else:
            self._begin()

    @property
    def best(self) -> Candidate:
        """Of the least loss."""
        return self.ranked()[0]

    def ranked(self) -> list[Candidate]:
        """All, the best first; of equal ones the one found first."""
        return sorted(self.candidates, key=lambda candidate: candidate.score.loss)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        evaluations: int | None = None,
        seconds: float | None = None,
        on_round: Callable[[Loop], None] = lambda loop: None,
    ) -> Candidate:
        """Go on until the budget, which counts what was done before a resume, is spent; returns the best.

        Ctrl-C ends it after the round at hand, with everything saved; a second one at once, and that round is repeated.

        Args:
            evaluations: candidates that are trained with.
            seconds: of wall-clock.
            on_round: called after each round.

        Raises:
            ProposerError: no proposer answers, now or any more, or `PATIENCE` rounds in a row brought nothing new; what was
                done is saved.
            KeyboardInterrupt: after the checkpoint.
        """
        began, before, barren = time.monotonic(), self.counts.seconds, 0
        with interruptions() as interrupted:
            while not interrupted and (seconds is None or self.counts.seconds < seconds):
                left = math.inf if evaluations is None else evaluations - self.counts.evaluated - len(self._waiting)
                if left <= 0:
                    break
                self._round(int(min(self.config.batch, left)))
                if not self.config.ahead:
                    self._keep(self._scores())
                self.counts.seconds = before + time.monotonic() - began
                on_round(self)
                barren = 0 if self._waiting else barren + 1
                if barren == PATIENCE:
                    self._save()
                    raise ProposerError(
                        f"{barren} rounds in a row brought no new candidate, the last because {self.errors[-1]['error']}"
                    )
            if not interrupted:
                self._keep(self._scores())
                self._migrate()  # so that who ends last selects among the best of all
                self.counts.seconds = before + time.monotonic() - began
        self._save()
        if interrupted:
            raise KeyboardInterrupt
        return self.best

    def _round(self, count: int) -> None:
        """Ask for ``count`` candidates, unless others were asked for before a kill, while those that wait are trained with."""
        if not self._requests:
            if self.counts.rounds % self.config.migrate_every == 0:
                self._migrate()
            self._requests = [self._request(k) for k in range(count)]
        self._save()
        asked = [self._ask(request) for request in self._requests]
        self._keep(self._scores())
        answers = [answer.result() for answer in asked]
        failures = [answer for answer in answers if isinstance(answer, ProposerError)]
        if len(failures) == len(answers):
            self._save()
            raise failures[0]
        requests, self._requests = self._requests, []
        self.counts.rounds += 1
        self.counts.failed += len(failures)
        for request, answer in zip(requests, answers, strict=True):
            if not isinstance(answer, ProposerError):
                self._admit(request, answer)

    def _ask(self, request: Request) -> Future[Proposal | ProposerError]:
        """The answer, by a thread that keeps no process alive: after a second Ctrl-C nobody waits for a server."""
        answer: Future[Proposal | ProposerError] = Future()

        def propose() -> None:
            try:
                answer.set_result(self._proposer.propose(request))
            except ProposerError as none:
                answer.set_result(none)
            except BaseException as defect:
                answer.set_exception(defect)

        threading.Thread(target=propose, daemon=True).start()
        return answer

    def _request(self, k: int) -> Request:
        number = self.worker * REQUESTS + self.counts.rounds * self.config.batch + k
        rng = np.random.default_rng([self.config.seed, number])
        parents = self._islands.parents(number % len(self._islands), self.config.parents, self._members(), rng)
        request = Request(
            number,
            self.config.goal,
            tuple(candidate.elite(self.worker) for candidate in self.ranked()[: self.config.examples]),
            tuple(self.candidates[parent].elite(self.worker) for parent in parents),
            tuple(f"{error['name']}: {error['error']}" for error in self.errors[-NOTES:]),
            self.config.longest,
        )
        return self._proposer.choose(request) if isinstance(self._proposer, Mixture) else request

    def _members(self) -> list[Member]:
        return [Member(c.score.loss, c.score.losses, len(c.genome.body)) for c in self.candidates]

    def _admit(self, request: Request, proposal: Proposal) -> None:
        """Let what is valid and new wait to be trained with."""
        self.counts.proposed += 1
        self.counts.tokens += proposal.tokens
        self.counts.cost += proposal.cost
        error = proposal.error
        if not error:
            genome = read(proposal.source)
            try:  # again: another answer of this round may do the same
                self._validator.known[behaviour(genome, self._validator.known)] = proposal.name
                self._waiting.append((request, proposal))
                return
            except ValueError as same:
                self.counts.known += 1
                error = str(same)
        elif error.startswith(SAME):
            self.counts.known += 1
        elif proposal.unreadable:
            self.counts.unreadable += 1
        else:
            self.counts.invalid += 1
        self._tell(request, proposal, None)
        self.errors.append(
            {"proposer": proposal.proposer, "name": proposal.name, "source": proposal.source, "error": error}
        )

    def _scores(self) -> list[Score]:
        """Of those that wait."""
        return self._judge.scores([objective(read(proposal.source)) for _, proposal in self._waiting])

    def _keep(self, scores: Sequence[Score]) -> None:
        """Make candidates of those that waited, and tell everyone."""
        waiting, self._waiting = self._waiting, []
        for (request, proposal), score in zip(waiting, scores, strict=True):
            number, genome = len(self.candidates), read(proposal.source)
            parents = tuple(int(elite.facts["number"]) for elite in request.parents)
            is_text = proposal.source == genome.text()
            source = python(genome) if is_text else proposal.source
            made = Candidate(number, proposal.name, source, genome, score, parents, proposal, self.counts.rounds)
            self.candidates.append(made)
            self._islands.add(number, request.number % len(self._islands), self._members())
            self.counts.evaluated += 1
            is_full = score.stage == len(self._judge.stages) - 1
            self.counts.full += is_full
            if is_full or not is_text:  # of thousands of mutants, those that were worth training
                self.archive.add(made.elite(self.worker))
            self._tell(request, proposal, score.loss)

    def _migrate(self) -> None:
        """Take in the best of every other worker that is better than ours."""
        own = self.best.score.loss
        for elite in self.archive.best_of_others(self.worker):
            guest = _guest(elite, len(self.candidates), self.counts.rounds)
            if elite.score >= own or any(guest.digest == c.digest for c in self.candidates):
                continue
            self.candidates.append(guest)
            self._islands.add(guest.number, guest.number % len(self._islands), self._members())
            with suppress(ValueError):  # ours does the same
                self._validator.known[behaviour(guest.genome, self._validator.known)] = guest.name

    def _tell(self, request: Request, proposal: Proposal, score: float | None) -> None:
        if isinstance(self._proposer, Mixture):
            self._proposer.tell(request, proposal, score)

    # -- files -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        genomes = {name: read(text) for name, text in self.config.start.items()}
        for name, genome in genomes.items():
            self._validator.known[behaviour(genome, self._validator.known)] = name
        scores = self._judge.scores([objective(genome) for genome in genomes.values()])
        for number, ((name, genome), score) in enumerate(zip(genomes.items(), scores, strict=True)):
            self.candidates.append(Candidate(number, name, python(genome), genome, score))
            self._islands.add(number, None, self._members())
            self.archive.add(self.candidates[-1].elite(self.worker))
        self._save()

    @property
    def _file(self) -> Path:
        return state_file(self.directory, self.worker)

    def _save(self) -> None:
        candidates = [
            {**dataclasses.asdict(c), "genome": c.genome.text(), "score": dataclasses.asdict(c.score)}
            for c in self.candidates
        ]
        facts = {
            "counts": dataclasses.asdict(self.counts),
            "candidates": candidates,
            "errors": self.errors,
            "requests": [request.to_json() for request in self._requests],
            "waiting": [[request.to_json(), dataclasses.asdict(proposal)] for request, proposal in self._waiting],
            "known": [[*key, name] for key, name in self._validator.known.items()],
            "judge": self._judge.state(),
            "islands": self._islands.state(),
            "bandit": self._proposer.bandit.state() if isinstance(self._proposer, Mixture) else None,
        }
        write_atomic(self._file, json.dumps(facts) + "\n")

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.counts, self.errors = LoopCounts(**state["counts"]), state["errors"]
        self.candidates = [_candidate(data) for data in state["candidates"]]
        self._requests = [Request.from_json(request) for request in state["requests"]]
        self._waiting = [(Request.from_json(request), Proposal(**told)) for request, told in state["waiting"]]
        self._validator.known.update({(first, second): name for first, second, name in state["known"]})
        self._judge.restore(state["judge"])
        self._islands.restore(state["islands"])
        if isinstance(self._proposer, Mixture):
            self._proposer.bandit.restore(state["bandit"])


def _candidate(data: Mapping[str, Any]) -> Candidate:
    proposal = data["proposal"] and Proposal(**data["proposal"])
    return Candidate(
        **{**data, "genome": parse(data["genome"]), "score": Score(**data["score"]), "parents": tuple(data["parents"]),
           "proposal": proposal}
    )  # fmt: skip


def _guest(elite: Elite, number: int, round_: int) -> Candidate:
    """The candidate of another worker, as one of ours without parents."""
    facts = elite.facts
    low, high = facts.get("interval", (math.nan, math.nan))
    score = Score(elite.score, facts["stage"], elite.scores, low, high, facts["scale"], facts["rate"])
    told = Proposal(elite.text, facts["name"], facts.get("thought", ""), f"worker {elite.worker}")
    return Candidate(number, told.name, told.source, parse(facts["program"]), score, (), told, round_)


def state_file(directory: Path, worker: int) -> Path:
    """What worker ``worker`` of the search in ``directory`` goes on from."""
    return directory / f"worker-{worker}.json"


def workers(directory: Path) -> list[int]:
    """Numbers of those that searched in ``directory``."""
    return sorted(int(file.stem.removeprefix("worker-")) for file in directory.glob("worker-*.json"))


def load(directory: Path, worker: int = 0) -> list[Candidate]:
    """The candidates of a worker of the search in ``directory``, by number.

    Raises:
        ValueError: there is none.
    """
    file = state_file(directory, worker)
    if not file.is_file():
        raise ValueError(
            f"{directory} holds no search for losses; make one with metaopt discover loss --out {directory}"
        )
    return [_candidate(data) for data in json.loads(file.read_text())["candidates"]]


@dataclass(frozen=True)
class Selected:
    """The winner among the elites of a search, on tasks that the search has not seen.

    Attributes:
        candidate: of the least mean there.
        losses: means there, by number, of all that took part.
        scale, rate: the setting of the winner there.
    """

    candidate: Candidate
    losses: Mapping[int, float]
    scale: float
    rate: float


ELITES = 12
"""Of how many the winner is selected."""


def select(candidates: Sequence[Candidate], judge: Judge, stage: Stage, most: int = ELITES) -> Selected:
    """The best of the ``most`` best candidates on another stage: who was only lucky in the search is not chosen."""
    elites = sorted(candidates, key=lambda candidate: candidate.score.loss)[:most]
    scores = judge.scores_on(stage, [objective(elite.genome) for elite in elites])
    losses = {elite.number: score.loss for elite, score in zip(elites, scores, strict=True)}
    k = min(range(len(elites)), key=lambda k: scores[k].loss if math.isfinite(scores[k].loss) else math.inf)
    return Selected(elites[k], losses, scores[k].scale, scores[k].rate)
