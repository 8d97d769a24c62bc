"""Processes that share a study: each trial is run by one, and those of a dead process are run again, on any storage.

Optuna has heartbeats for relational databases alone. Here each process writes a counter of its own into the study's attributes.
A process whose counter stands still for the grace period, by the clock of whoever looks, is dead: clocks of several machines
need not agree. On one machine a process that is no more is dead at once. A dead process's running trials become FAIL and are
put in the queue again, with ``retry_of``; one whose process dies a second time is given up, and another takes its place in the
budget.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

INTERVAL, GRACE = 5.0, 60.0
"""Seconds between two heartbeats, and without one until a process counts as dead."""

WORKER, TAKER, RETRY_OF, DEATHS = "worker", "taken_over_by", "retry_of", "deaths"
_PREFIX = "worker:"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Worker:
    """One process's part in a study.

    Args:
        study: which all processes share.
        budget: trials that are to finish (complete or pruned), by all processes together.
        interval, grace: seconds; see the module.
    """

    def __init__(self, study: optuna.Study, budget: int, interval: float = INTERVAL, grace: float = GRACE) -> None:
        self.study, self.budget, self.interval, self.grace = study, budget, interval, grace
        self._storage = study._storage  # Optuna has no public name for the storage of a study
        self.id = uuid.uuid4().hex[:12]
        self._beats = 0
        self._seen: dict[str, tuple[Any, float]] = {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While inside, others see this process alive."""
        done = threading.Event()
        self._beat()
        thread = threading.Thread(target=self._keep_beating, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def claim(self) -> optuna.Trial | None:
        """The next trial to run, its parameters not yet asked for; None where the budget is used or others run the rest."""
        states = [trial.state for trial in self._trials()]
        taken = sum(state in (*_FINISHED, TrialState.RUNNING) for state in states)
        if taken >= self.budget and TrialState.WAITING not in states:
            return None
        trial = self.study.ask()
        trial.set_user_attr(WORKER, self.id)
        earlier = sum(other.state != TrialState.FAIL for other in self._trials() if other.number < trial.number)
        if earlier >= self.budget and RETRY_OF not in trial.user_attrs:
            self.study.tell(trial, state=TrialState.FAIL)  # another process took the last one at the same moment
            return None
        return trial

    def is_finished(self) -> bool:
        """Whether as many trials as the budget says are complete or pruned, and none waits to be run again."""
        states = [trial.state for trial in self._trials()]
        return sum(state in _FINISHED for state in states) >= self.budget and TrialState.WAITING not in states

    def tell(self, trial: optuna.Trial, values: list[float] | None, state: TrialState) -> bool:
        """Finish a trial; False if others have taken it over meanwhile."""
        try:
            self.study.tell(trial, values, state=state)
        except (ValueError, UpdateFinishedTrialError):
            if self.study.trials[trial.number].state == TrialState.RUNNING:
                raise
            return False
        return True

    def give_back(self, trial: optuna.Trial) -> None:
        """Put an unfinished trial in the queue again: this process stops in good order."""
        self._again(self.study.trials[trial.number], died=False)

    def recover(self) -> list[int]:
        """Take over the trials of dead processes; their numbers."""
        beats = {
            key.removeprefix(_PREFIX): beat for key, beat in self.study.user_attrs.items() if key.startswith(_PREFIX)
        }
        running = [trial for trial in self._trials() if trial.state == TrialState.RUNNING]
        dead = []
        for trial in running:
            worker = trial.user_attrs.get(WORKER, f"of trial {trial.number}")  # it may have died before it signed
            if worker != self.id and self._is_dead(worker, beats.get(worker)) and self._again(trial, died=True):
                dead.append(trial.number)
        return dead

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _again(self, trial: FrozenTrial, died: bool) -> bool:
        """FAIL and queue a running trial, once, whoever else tries to; False if it was not this process that did."""
        storage, trial_id = self._storage, trial._trial_id
        with suppress(UpdateFinishedTrialError):
            storage.set_trial_user_attr(trial_id, TAKER, self.id)
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        # attributes of a finished trial stand for ever: of several takers, all read the same name here
        left = storage.get_trial(trial_id)
        if left.state != TrialState.FAIL or left.user_attrs.get(TAKER) != self.id:
            return False
        deaths = left.user_attrs.get(DEATHS, 0) + died
        if deaths <= 1:
            first = left.user_attrs.get(RETRY_OF, left.number)
            params = left.params or left.system_attrs.get("fixed_params", {})
            self.study.enqueue_trial(params, user_attrs={RETRY_OF: first, DEATHS: deaths})
        return True

    def _is_dead(self, worker: str, beat: Any) -> bool:
        now = time.monotonic()
        if self._seen.get(worker, (None, 0.0))[0] != beat or worker not in self._seen:
            self._seen[worker] = (beat, now)
        if beat is not None and beat["machine"] is not None and beat["machine"] == machine():
            return not _runs(beat["pid"])
        return now - self._seen[worker][1] > self.grace

    def _beat(self) -> None:
        self._beats += 1
        self.study.set_user_attr(
            _PREFIX + self.id,
            {"beat": self._beats, "pid": os.getpid(), "machine": machine(), "host": os.uname().nodename},
        )

    def _keep_beating(self, done: threading.Event) -> None:
        while not done.wait(self.interval):
            with suppress(Exception):  # a storage that is away for a moment; the next beat counts
                self._beat()
        self._storage.remove_session()  # this thread's connection


def machine() -> str | None:
    """What process numbers are unique in: this boot of this machine, and the namespace; None where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # a killed process stays a zombie until its parent has asked for it
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
