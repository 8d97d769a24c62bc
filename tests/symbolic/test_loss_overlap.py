"""Losses are asked for while others are trained with; what kills and Ctrl-C leave of such a search."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.objective import Objective
from metaopt.search import Archive, Charge, Ledger, Proposal, Request
from metaopt_symbolic.genome import LOSS_SEEDS
from metaopt_symbolic.losses.candidate import LossValidator
from metaopt_symbolic.losses.judge import Judge, Score
from metaopt_symbolic.losses.mutator import LossMutator
from metaopt_symbolic.proposals.candidate import workers
from metaopt_symbolic.proposals.loop import Loop, LoopConfig
from metaopt_symbolic.proposals.proposers import ledger_file


class Quick(Judge):
    """Its score of a loss is its value for rho = 1, so that it takes no time."""

    def __init__(self) -> None:
        super().__init__(())

    def scores(self, objectives: Sequence[Objective]) -> list[Score]:
        losses = [float(objective({"rho": torch.ones(1)})) for objective in objectives]
        return [Score(loss, -1, {"t": loss}, loss, loss, 1.0, 0.1) for loss in losses]


class Paid:
    """A proposer whose answers are in a ledger, and depend on all that a request says."""

    name = "paid"

    def __init__(self, validate: LossValidator, directory: Path, worker: int = 0) -> None:
        self._ledger, self._lock = Ledger(ledger_file(directory, worker)), threading.Lock()

    def propose(self, request: Request) -> Proposal:
        key = hashlib.sha256(json.dumps(request.to_json()).encode()).hexdigest()
        with self._lock:  # calls that are under way at a kill are another test's
            if self._ledger.reply(key) is None:
                call = self._ledger.ask(key, {}, Charge(calls=1))
                self._ledger.answered(call, {"shift": int(key[:4], 16) / 20000 - 1.6}, Charge(calls=1))
            reply = self._ledger.reply(key)
        assert reply is not None
        source = f"def loss(rho, beta):\n    return F.softplus({reply['shift']} - beta * rho)"
        return Proposal(source, f"p_{key[:6]}", "", self.name)

    def close(self) -> int:
        """Calls that were paid."""
        with self._lock:
            self._ledger.close()
            return self._ledger.spent.calls


def mutator(validate: LossValidator, directory: Path, worker: int) -> LossMutator:
    return LossMutator(validate)


Making = Callable[[LossValidator, Path, int], Any]


@contextmanager
def searching(
    directory: Path, make: Making, judge: Judge | None = None, batch: int = 3, worker: int = 0
) -> Iterator[Loop]:
    directory.mkdir(exist_ok=True)
    validator, judge = LossValidator(), judge or Quick()
    proposer = make(validator, directory, worker)
    config = LoopConfig(
        "Learn.",
        (proposer.name,),
        [],
        LOSS_SEEDS,
        batch=batch,
        ahead=make is not mutator,
        islands={"count": 2},
        migrate_every=2,
    )
    try:
        yield Loop(config, judge, proposer, validator, directory, worker=worker)
    finally:
        if isinstance(proposer, Paid):
            proposer.close()


def shown(loop: Loop) -> list[tuple[Any, ...]]:
    return [(c.name, c.source, c.parents, c.proposal, c.score.loss, c.round) for c in loop.candidates]


def test_candidates_are_asked_for_while_others_are_trained_with(tmp_path: Path) -> None:
    """Each waits for the other: if one came after the other, both would wait for ever."""
    meeting = threading.Barrier(2, timeout=300)

    class Meets(Quick):
        scored = -1  # batches of candidates; the start is no such

        def scores(self, objectives: Sequence[Objective]) -> list[Score]:
            if objectives:
                self.scored += 1
            if objectives and 0 < self.scored < 4:
                meeting.wait()
            return super().scores(objectives)

    class MeetsToo(LossMutator):
        def propose(self, request: Request) -> Proposal:
            if request.number > 0:
                meeting.wait()
            return super().propose(request)

    with searching(tmp_path, lambda validate, *_: MeetsToo(validate), Meets(), batch=1) as loop:
        loop.run(evaluations=4)
    assert (loop.counts.evaluated, loop.counts.rounds) == (4, 4)
    assert [c.round for c in loop.candidates if c.proposal] == [1, 2, 3, 4]


def test_what_takes_no_time_is_asked_when_all_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Looks(Quick):
        def scores(self, objectives: Sequence[Objective]) -> list[Score]:
            seen.append((len(objectives), loop.counts.rounds if seen else 0))
            return super().scores(objectives)

    with searching(tmp_path, mutator, Looks()) as loop:
        loop.run(evaluations=6)
    assert [rounds for count, rounds in seen[1:] if count] == [1, 2]


class Killed(BaseException):
    """In place of a signal."""


def dies(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """The process ends when ``owner.name`` is called for the ``call``-th time from now on."""
    calls, before = 0, getattr(owner, name)

    def replaced(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return before(*given)

    monkeypatch.setattr(owner, name, replaced)


POINTS = [(Quick, "scores", 3), (Archive, "add", 8), (Loop, "_save", 3), (Loop, "_admit", 5), (Loop, "_keep", 2)]


@pytest.mark.parametrize("make", [Paid, mutator])
def test_a_search_killed_anywhere_is_the_same_and_pays_once(
    make: Making, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with searching(tmp_path / "whole", make) as whole:
        whole.run(evaluations=9)
    assert whole.counts.evaluated == 9
    for owner, name, call in POINTS:
        directory = tmp_path / f"{name}{call}"
        with monkeypatch.context() as patched:
            dies(patched, owner, name, call)
            with pytest.raises(Killed), searching(directory, make) as killed:
                killed.run(evaluations=9)
        with searching(directory, make) as again:
            again.run(evaluations=9)
        assert shown(again) == shown(whole), (name, call)
        kept = [(e.digest, e.generation, e.score) for e in again.archive.elites()]
        assert kept == [(e.digest, e.generation, e.score) for e in whole.archive.elites()]
        if make is Paid:
            assert Paid(LossValidator(), directory).close() == Paid(LossValidator(), tmp_path / "whole").close()


def test_ctrl_c_ends_a_search_where_all_of_it_is_saved(tmp_path: Path) -> None:
    class Interrupts(Paid):
        def propose(self, request: Request) -> Proposal:
            if request.number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().propose(request)

    with searching(tmp_path / "whole", Paid) as whole:
        whole.run(evaluations=9)
    with searching(tmp_path / "x", Interrupts) as loop, pytest.raises(KeyboardInterrupt):
        loop.run(evaluations=9)
    assert (loop.counts.rounds, loop.counts.proposed, loop.counts.evaluated) == (2, 6, 3)
    with searching(tmp_path / "x", Paid) as again:
        assert again.counts.proposed == 6
        again.run(evaluations=9)
    assert shown(again) == shown(whole)


def test_a_second_ctrl_c_waits_for_no_server(tmp_path: Path) -> None:
    silent = threading.Event()

    class Silent(LossMutator):
        def propose(self, request: Request) -> Proposal:
            silent.wait(600)
            return super().propose(request)

    class Interrupts(Quick):
        asked = 0

        def scores(self, objectives: Sequence[Objective]) -> list[Score]:
            self.asked += 1
            if self.asked == 2:  # the start was the first
                os.kill(os.getpid(), signal.SIGINT)
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            return super().scores(objectives)

    with searching(tmp_path, lambda validate, *_: Silent(validate), Interrupts()) as loop:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            loop.run(evaluations=3)
        assert time.monotonic() - began < 300, "the server says nothing for 600 s"
        silent.set()


def test_what_a_proposer_gets_wrong_is_no_answer_of_a_server(tmp_path: Path) -> None:
    class Broken(LossMutator):
        def propose(self, request: Request) -> Proposal:
            raise ZeroDivisionError

    with searching(tmp_path, lambda validate, *_: Broken(validate)) as loop, pytest.raises(ZeroDivisionError):
        loop.run(evaluations=3)


# -- workers -----------------------------------------------------------------------------------------------------------


def test_workers_take_in_each_others_best(tmp_path: Path) -> None:
    with searching(tmp_path, mutator) as first:
        first.run(evaluations=9)
    with searching(tmp_path, mutator, worker=1) as second:
        assert second.best.score.loss > first.best.score.loss, "the start is not as good"
        second.run(evaluations=3)
    guests = [c for c in second.candidates if c.proposal and c.proposal.proposer == "worker 0"]
    assert [c.digest for c in guests] == [first.best.digest]
    assert second.counts.evaluated == 3, "guests cost nothing"
    with searching(tmp_path, mutator, worker=1) as again:
        assert shown(again) == shown(second)
        again.run(evaluations=12)
    number = guests[0].number
    assert any(number in c.parents for c in again.candidates), "they have children"
    assert {e.worker for e in Archive(tmp_path, LossValidator.study, None).elites()} == {0, 1}
    assert workers(tmp_path) == [0, 1]
    assert [c.digest for c in LossValidator().load(tmp_path, 1)] == [c.digest for c in again.candidates]


def test_workers_that_know_nothing_of_each_other_do_not_draw_the_same(tmp_path: Path) -> None:
    with searching(tmp_path / "x", mutator) as first, searching(tmp_path / "y", mutator, worker=1) as second:
        first.run(evaluations=3)
        second.run(evaluations=3)
    drawn = [{c.digest for c in loop.candidates if c.proposal} for loop in (first, second)]
    assert [len(each) for each in drawn] == [3, 3]
    assert drawn[0] != drawn[1]


def test_what_others_find_between_a_kill_and_a_resume_costs_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the killed round had asked is asked again as it was, though there are guests now that it would have seen."""

    class Better(Paid):
        def propose(self, request: Request) -> Proposal:
            made = super().propose(request)
            return dataclasses.replace(made, source=made.source.replace("softplus(", "softplus(-2 + "))

    with monkeypatch.context() as patched:
        dies(patched, Loop, "_admit", 1)
        with pytest.raises(Killed), searching(tmp_path, Paid, worker=1) as killed:
            killed.run(evaluations=9)
    with searching(tmp_path, Better) as other:
        other.run(evaluations=9)
    with searching(tmp_path, Paid, worker=1) as again:
        again.run(evaluations=9)
    assert any(c.proposal and c.proposal.proposer == "worker 0" for c in again.candidates)
    assert Paid(LossValidator(), tmp_path, 1).close() == again.counts.proposed


def test_workers_at_once_ask_different_things_and_pay_themselves(tmp_path: Path) -> None:
    def work(worker: int) -> None:
        with searching(tmp_path, Paid, worker=worker) as loop:
            loop.run(evaluations=9)
            counts[worker] = loop.counts.proposed

    counts: dict[int, int] = {}
    threads = [threading.Thread(target=work, args=(worker,)) for worker in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    candidates = [LossValidator().load(tmp_path, worker) for worker in (0, 1)]
    own = [{c.name for c in each if c.proposal and c.proposal.proposer == "paid"} for each in candidates]
    assert [len(names) for names in own] == [9, 9]
    assert not own[0] & own[1], "names are of requests"
    assert [Paid(LossValidator(), tmp_path, worker).close() for worker in (0, 1)] == [counts[0], counts[1]]
    archived = Archive(tmp_path, LossValidator.study, None).elites()
    for worker in (0, 1):
        assert {e.facts["name"] for e in archived if e.worker == worker} >= own[worker]
    bests = [min(c.score.loss for c in each) for each in candidates]
    assert min(bests) == min(e.score for e in archived)
