"""Two processes on one study, one of them killed: on every storage no trial is lost, and none is run twice."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import postgresql
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from metaopt.tune import workers
from metaopt.tune.studies import open_storage, open_study
from metaopt.tune.tuning import Problem, TuneConfig, work
from metaopt.tune.workers import RETRY_OF, WORKER, Worker

CONFIG = TuneConfig("adamw", "booth", trials=12, steps=20, units=4, seeds=1, search=("lr",), sampler="random")


@pytest.fixture(scope="module")
def url_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The URL of a fresh storage of each kind; the PostgreSQL server starts when first asked for."""
    servers = postgresql.server()
    started: list[str] = []

    def url(kind: str) -> str:
        if kind == "postgresql":
            if not started:
                started.append(servers.__enter__())
            return started[0]
        path = tmp_path_factory.mktemp(kind) / "study"
        return f"journal:{path}" if kind == "journal" else f"sqlite:///{path}"

    yield url
    if started:
        servers.__exit__(None, None, None)


def opened(url: str, problem: Problem) -> optuna.Study:
    return open_study(open_storage(url), "shared", problem.settings(), 1)


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_trials_of_a_killed_worker_are_run_again_once(kind: str, url_of: Callable[[str], str]) -> None:
    url, problem = url_of(kind), Problem(CONFIG)
    storage = open_storage(url)
    study = open_study(storage, "shared", problem.settings(), 1)
    script = Path(__file__).parent / "dying_worker.py"
    victim = subprocess.Popen([sys.executable, str(script), url, "shared", "3"], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None and victim.stdout.readline() == "standing still\n"
    held = {trial.number: trial.params for trial in study.get_trials(states=(TrialState.RUNNING,))}
    assert len(held) == 3

    units = 0

    def kill_after_a_while(runs: Any) -> None:
        nonlocal units
        units += 1
        if units == 5:  # its trials are another's by now, and the survivor has told some of its own
            states = [study.trials[number].state for number in held]
            assert states == [TrialState.RUNNING] * 3, "a worker that lives keeps its trials"
            victim.kill()
            victim.wait()

    work(problem, study, batch=4, on_unit=kill_after_a_while)
    victim.stdout.close()
    trials = study.get_trials()
    assert Counter(t.state for t in trials if t.state != TrialState.FAIL).keys() <= {
        TrialState.COMPLETE,
        TrialState.PRUNED,
    }
    assert sum(t.state != TrialState.FAIL for t in trials) == CONFIG.trials
    again = {t.user_attrs[RETRY_OF]: t.params for t in trials if RETRY_OF in t.user_attrs}
    assert again == held
    assert sum(RETRY_OF in t.user_attrs for t in trials) == len(held)
    assert {t.number for t in trials if t.state == TrialState.FAIL} == set(held)
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def test_a_worker_of_another_machine_is_dead_when_its_heart_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(workers, "machine", lambda: None)
    monkeypatch.setattr(workers.time, "monotonic", lambda: now)
    study = opened(f"journal:{tmp_path / 'log'}", Problem(CONFIG))
    far, near = (Worker(study, 12, grace=60.0) for _ in range(2))
    far._beat()
    claimed = far.claim()
    assert claimed is not None
    claimed.suggest_float("lr", 1e-5, 1e-1, log=True)
    assert near.recover() == []
    now = 50.0
    far._beat()
    assert near.recover() == []
    now = 105.0
    assert near.recover() == [], "it was seen alive 55 seconds ago"
    now = 111.0
    assert near.recover() == [claimed.number]
    assert near.recover() == []
    # the far one was only slow: what it tells now is too late, and it is told so
    assert not far.tell(claimed, [1.0], TrialState.COMPLETE)
    second = near.claim()
    assert second is not None and second.user_attrs[RETRY_OF] == claimed.number
    assert study.trials[second.number].user_attrs[WORKER] == near.id


def test_two_takers_of_one_trial_queue_it_once(tmp_path: Path) -> None:
    study = opened(f"sqlite:///{tmp_path / 'db'}", Problem(CONFIG))
    dead, *takers = (Worker(study, 12) for _ in range(3))
    trial = dead.claim()
    assert trial is not None
    left = study.trials[trial.number]
    assert [taker._again(left, died=True) for taker in takers] == [True, False]
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_settings_that_kill_two_workers_are_given_up(tmp_path: Path) -> None:
    study = opened(f"journal:{tmp_path / 'log'}", Problem(CONFIG))
    worker, taker = (Worker(study, 12) for _ in range(2))
    for _ in range(2):
        trial = worker.claim()
        assert trial is not None
        taker._again(study.trials[trial.number], died=True)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.FAIL]


def test_processes_share_one_budget(tmp_path: Path) -> None:
    study = opened(f"journal:{tmp_path / 'log'}", Problem(CONFIG))
    one, two = (Worker(study, 3) for _ in range(2))
    claimed = [one.claim(), two.claim(), one.claim()]
    assert all(claimed)
    assert one.claim() is None and two.claim() is None
    assert not one.is_finished()
    for trial in claimed:
        assert trial is not None
        one.tell(trial, [1.0], TrialState.COMPLETE)
    assert two.is_finished()


def test_an_interrupted_process_puts_its_trials_back(tmp_path: Path) -> None:
    problem = Problem(CONFIG)
    study = opened(f"journal:{tmp_path / 'log'}", problem)

    def interrupt(runs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(problem, study, batch=5, on_unit=interrupt)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert len(waiting) == 5
    settings = {number: trial.params for number, trial in enumerate(study.trials[:5])}
    work(problem, study, batch=5)
    assert sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials) == CONFIG.trials
    again = {t.user_attrs[RETRY_OF]: t.params for t in study.trials if RETRY_OF in t.user_attrs}
    assert again == settings
