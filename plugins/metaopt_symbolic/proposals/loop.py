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
from typing import Any, Generic, Protocol

import numpy as np

from metaopt.files import write_atomic
from metaopt.interruptions import interruptions
from metaopt.search import Archive, Mixture, Proposal, Proposer, ProposerError, Request
from metaopt_symbolic.proposals.candidate import SAME, Candidate, CandidateValidator, S, state_file
from metaopt_symbolic.proposals.islands import Islands, Member

REQUESTS = 1_000_000
"""More than one worker makes: by its number, no request is like one of another worker."""
PATIENCE = 5
"""Rounds without a new candidate after which a search ends: what proposes nothing else will not for more money."""
NOTES = 5
"""How many of the latest errors proposers see."""


class Judge(Protocol[S]):
    """What says how good candidates are, in stages."""

    @property
    def stages(self) -> Sequence[Any]:
        """The last one judges the best."""

    def scores(self, candidates: Sequence[Any]) -> list[S]:
        """One score for each `CandidateValidator.trained`."""

    def state(self) -> Any:
        """What `restore` takes, as JSON holds it."""

    def restore(self, state: Any) -> None:
        """Go on as the judge whose `state` this is."""


@dataclass(frozen=True)
class LoopConfig:
    """What makes a search the search that it is.

    Attributes:
        goal: of the candidates, in words for proposers.
        proposers: names of those that take part.
        judge: the judge in words or numbers; searches with others do not mix.
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
    judge: Any
    start: Mapping[str, str]
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
        evaluated: candidates that were trained, the start not included.
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


class Loop(Generic[S]):
    """A search in a directory; making it again goes on with what is there.

    Args:
        config: of the search.
        judge: fresh.
        proposer: of candidates; a `metaopt.search.Mixture` is told what they were worth.
        validator: of the kind of candidates; the one that proposers validate with.
        directory: of its files.
        storage: URL of an Optuna storage for the archive; by default a journal file in ``directory``.
        worker: number of this process among those that share the archive.

    Attributes:
        validator: of the kind of candidates.
        counts: what was done.
        candidates: all that were evaluated, by number.
        errors: of what could not be mended, and of what could not be trained: proposer, name, source and error each.

    Raises:
        ValueError: the directory holds a search with another config, or a program of the start is not valid.
    """

    def __init__(
        self,
        config: LoopConfig,
        judge: Judge[S],
        proposer: Proposer,
        validator: CandidateValidator[S],
        directory: Path | str,
        storage: str | None = None,
        worker: int = 0,
    ) -> None:
        self.config, self.directory, self.worker = config, Path(directory), worker
        self.archive = Archive(self.directory, validator.study, dataclasses.asdict(config), storage)
        self.counts, self.candidates, self.errors = LoopCounts(), list[Candidate[S]](), list[dict[str, str]]()
        self.validator, self._judge, self._proposer = validator, judge, proposer
        self._islands = Islands(**config.islands)
        self._requests: list[Request] = []
        self._waiting: list[tuple[Request, Proposal]] = []
        if self._file.is_file():
            self._restore(json.loads(self._file.read_text()))
        else:
            self._begin()

    @property
    def best(self) -> Candidate[S]:
        """Of the least loss."""
        return self.ranked()[0]

    def ranked(self) -> list[Candidate[S]]:
        """All, the best first; of equal ones the one found first."""
        return sorted(self.candidates, key=lambda candidate: candidate.score.loss)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        evaluations: int | None = None,
        seconds: float | None = None,
        on_round: Callable[[Loop[S]], None] = lambda loop: None,
    ) -> Candidate[S]:
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
            try:  # again: another answer of this round may do the same
                self.validator.remember(self.validator.read(proposal.source), proposal.name)
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
        self._note(proposal, error)

    def _note(self, proposal: Proposal, error: str) -> None:
        self.errors.append(
            {"proposer": proposal.proposer, "name": proposal.name, "source": proposal.source, "error": error}
        )

    def _scores(self) -> list[S]:
        """Of those that wait."""
        genomes = [self.validator.read(proposal.source) for _, proposal in self._waiting]
        return self._judge.scores([self.validator.trained(genome) for genome in genomes])

    def _keep(self, scores: Sequence[S]) -> None:
        """Make candidates of those that waited, and tell everyone."""
        waiting, self._waiting = self._waiting, []
        for (request, proposal), score in zip(waiting, scores, strict=True):
            number, genome = len(self.candidates), self.validator.read(proposal.source)
            parents = tuple(int(elite.facts["number"]) for elite in request.parents)
            is_text = proposal.source == genome.text()
            source = self.validator.python(genome) if is_text else proposal.source
            made = Candidate(number, proposal.name, source, genome, score, parents, proposal, self.counts.rounds)
            self.candidates.append(made)
            self._islands.add(number, request.number % len(self._islands), self._members())
            self.counts.evaluated += 1
            is_full = score.stage == len(self._judge.stages) - 1
            self.counts.full += is_full
            if is_full or not is_text:  # of thousands of mutants, those that were worth training
                self.archive.add(made.elite(self.worker))
            if score.fault:
                self._note(proposal, score.fault)
            self._tell(request, proposal, score.loss)

    def _migrate(self) -> None:
        """Take in the best of every other worker that is better than ours."""
        own = self.best.score.loss
        for elite in self.archive.best_of_others(self.worker):
            guest = self.validator.guest(elite, len(self.candidates), self.counts.rounds)
            if elite.score >= own or any(guest.digest == c.digest for c in self.candidates):
                continue
            self.candidates.append(guest)
            self._islands.add(guest.number, guest.number % len(self._islands), self._members())
            with suppress(ValueError):  # ours does the same
                self.validator.remember(guest.genome, guest.name)

    def _tell(self, request: Request, proposal: Proposal, score: float | None) -> None:
        if isinstance(self._proposer, Mixture):
            self._proposer.tell(request, proposal, score)

    # -- files -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        genomes = {name: self.validator.read(text) for name, text in self.config.start.items()}
        for name, genome in genomes.items():
            self.validator.remember(genome, name)
        scores = self._judge.scores([self.validator.trained(genome) for genome in genomes.values()])
        for number, ((name, genome), score) in enumerate(zip(genomes.items(), scores, strict=True)):
            self.candidates.append(Candidate(number, name, self.validator.python(genome), genome, score))
            self._islands.add(number, None, self._members())
            self.archive.add(self.candidates[-1].elite(self.worker))
        self._save()

    @property
    def _file(self) -> Path:
        return state_file(self.directory, self.worker)

    def _save(self) -> None:
        facts = {
            "study": self.validator.study,
            "counts": dataclasses.asdict(self.counts),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "errors": self.errors,
            "requests": [request.to_json() for request in self._requests],
            "waiting": [[request.to_json(), dataclasses.asdict(proposal)] for request, proposal in self._waiting],
            "known": [[*key, name] for key, name in self.validator.known.items()],
            "judge": self._judge.state(),
            "islands": self._islands.state(),
            "bandit": self._proposer.bandit.state() if isinstance(self._proposer, Mixture) else None,
        }
        write_atomic(self._file, json.dumps(facts) + "\n")

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.counts, self.errors = LoopCounts(**state["counts"]), state["errors"]
        self.candidates = [self.validator.candidate(data) for data in state["candidates"]]
        self._requests = [Request.from_json(request) for request in state["requests"]]
        self._waiting = [(Request.from_json(request), Proposal(**told)) for request, told in state["waiting"]]
        self.validator.known.update({(first, second): name for first, second, name in state["known"]})
        self._judge.restore(state["judge"])
        self._islands.restore(state["islands"])
        if isinstance(self._proposer, Mixture):
            self._proposer.bandit.restore(state["bandit"])
