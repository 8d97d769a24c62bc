"""``metaopt tune``: the hyperparameters of an optimizer on a task, by Optuna, with many trials in one unroll.

Trials are asked for and told one by one, and trained together (`metaopt.tune.lockstep`). After each budget unit every trial
that is under way reports its loss on the valid split; those that the pruner stops leave, and new ones take their places. A
trial is the mean over a few seeds, the same for all; one that diverges is pruned, and no number that is not finite reaches the
study.

The best of noisy values looks better than it is. So the best few trials train again from fresh seeds, and the best of these
means is the winner; its loss on the test split comes from runs with further seeds, which nothing was chosen by.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt import registry
from metaopt.evaluate.course import Course, seed_streams
from metaopt.evaluate.race import TEST_EXAMPLES
from metaopt.evaluate.statistics import Estimate, estimate
from metaopt.resolve import hashable, resolve_rule, wrapped
from metaopt.suite import content_hash
from metaopt.task import Task
from metaopt.tune.lockstep import Lockstep, Run, usual_units
from metaopt.tune.search_space import ALL, SearchSpace

if TYPE_CHECKING:
    import optuna

OBJECTIVES: Mapping[str, Callable[[Run], float]] = {
    "loss": lambda run: run.score,
    "time": lambda run: run.seconds,
    "memory": lambda run: float(run.memory),
}
"""What a study can minimise: the normalised valid loss; seconds of process time, as a share of those of the trials that trained
together; bytes of parameters and state of one copy."""

POLL = 0.5
"""Seconds between two looks at what the other processes do, where nothing else is to be done."""


@dataclass(frozen=True)
class TuneConfig:
    """A search; all that its processes must agree on.

    Attributes:
        optimizer: what `metaopt.resolve.resolve_rule` takes.
        task: a registered task or family.
        trials: how many are to finish, complete or pruned.
        wrappers: registered optimizers that hold a rule, put around ``optimizer`` in this order (``by_role``, ``scheduled``).
        fixed: hyperparameters and options that differ from the defaults.
        search: as `SearchSpace.of_rule` takes it.
        seeds: training runs per trial.
        steps: length of a run; None: the task's horizon.
        units: budget units of a run; None: the largest divisor of the steps up to 10.
        sampler, pruner: names of `metaopt.tune.algorithms`.
        objectives: names of `OBJECTIVES`, ``loss`` first.
        constraints: upper limits, by name of an objective.
        seed: determines everything but times, where one process works.
        device, backend: of the unroll.
    """

    optimizer: str
    task: str
    trials: int = 100
    wrappers: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: tuple[str, ...] = (ALL,)
    seeds: int = 2
    steps: int | None = None
    units: int | None = None
    sampler: str = "tpe"
    pruner: str = "lockstep"
    objectives: tuple[str, ...] = ("loss",)
    constraints: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("trials", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (*self.objectives, *self.constraints):
            if name not in OBJECTIVES:
                raise ValueError(f"objectives and constraints are of {', '.join(OBJECTIVES)}, got {name!r}")
        if self.objectives[:1] != ("loss",) or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must be different and begin with loss, got {', '.join(self.objectives)}")
        if len(self.objectives) > 1 and self.pruner not in ("none", "lockstep"):
            raise ValueError(f"Optuna prunes by one objective only, got {len(self.objectives)}; give pruner='none'")
        for name, limit in self.constraints.items():
            if not isinstance(limit, (int, float)) or not limit > 0:
                raise ValueError(f"the limit of {name} must be a number above 0, got {limit!r}")


class Problem:
    """A `TuneConfig` with its things made: rule, space, course and seeds.

    Args:
        config: of the search.

    Raises:
        ValueError: an unknown name, or a search range outside its domain.
    """

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.rule = wrapped(resolve_rule(config.optimizer), config.wrappers).replaced(**config.fixed)
        self.space = SearchSpace.of_rule(self.rule, config.search)
        source = registry.create("task", config.task, device=config.device)
        self.course = Course.of(source, config.steps, config.device, config.backend)
        self.units = config.units or usual_units(self.course.steps)
        self.content = content_hash(source) if isinstance(source, Task) else config.task
        self.seeds = seed_streams(config.seed, self.course.name, config.seeds, 0)[0]

    def settings(self) -> dict[str, Any]:
        """What a study must agree with to go on, as JSON; see `metaopt.tune.studies.open_study`."""
        return dataclasses.asdict(self.config) | {
            "steps": self.course.steps,
            "units": self.units,
            "content": self.content,
            "space_digest": self.space.digest,  # it differs where the declarations have changed since
            "space": self.space.to_json(),
        }

    def lockstep(self) -> Lockstep:
        """A fresh one for the trials."""
        return Lockstep(self.course, self.rule, self.seeds, self.units)


def config_of(settings: Mapping[str, Any], trials: int) -> TuneConfig:
    """The config that a study was made with: inverse of `Problem.settings`."""
    names = {field.name for field in dataclasses.fields(TuneConfig)}
    values: dict[str, Any] = {key: hashable(value) for key, value in settings.items() if key in names}
    return TuneConfig(**{**values, "trials": trials})


def work(
    problem: Problem,
    study: optuna.Study,
    *,
    batch: int = 16,
    first: bool = False,
    grace: float | None = None,
    on_unit: Callable[[Sequence[Run]], None] = lambda runs: None,
) -> int:
    """Run trials of the study until as many as the config says are finished, by this process and others together.

    Args:
        problem: what the study is of.
        study: from `metaopt.tune.studies.open_study`.
        batch: trials that train together here.
        first: whether this process starts the study, whose sampler then has the config's seed; others have their own.
        grace: seconds without a heartbeat until a process counts as dead.
        on_unit: called after every budget unit with all runs under way.

    Returns:
        how many trials this process has finished.

    Raises:
        KeyboardInterrupt: after its trials under way were put in the queue again.
    """
    from optuna.trial import TrialState

    from metaopt.tune import algorithms
    from metaopt.tune.workers import GRACE, Worker

    config = problem.config
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    worker = Worker(study, config.trials, grace=GRACE if grace is None else grace)
    own = config.seed if first else int(worker.id, 16) % 2**31
    study.sampler = algorithms.sampler(config.sampler, own)
    study.pruner = algorithms.pruner(config.pruner if len(config.objectives) == 1 else "none", problem.units)
    lockstep, finished = problem.lockstep(), 0
    with worker.at_work():
        try:
            while True:
                worker.recover()
                while len(lockstep.runs) < batch and (trial := worker.claim()) is not None:
                    lockstep.admit([Run(trial, problem.space.suggest(trial))])
                if not lockstep.runs:
                    if worker.is_finished():
                        return finished
                    time.sleep(POLL)
                    continue
                runs = lockstep.advance()
                on_unit(runs)
                over = _judge(runs, problem, study)
                for run, state in over:
                    values = (
                        [OBJECTIVES[name](run) for name in config.objectives] if state == TrialState.COMPLETE else None
                    )
                    finished += worker.tell(run.key, values, state)
                lockstep.drop([run for run, _ in over])
        except BaseException:  # whatever ends this process in good order, its trials are not lost
            for run in lockstep.runs:
                worker.give_back(run.key)
            raise


def _judge(runs: Sequence[Run], problem: Problem, study: optuna.Study) -> list[tuple[Run, Any]]:
    """Report all runs under way; those that are over, with their states."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    single = len(problem.config.objectives) == 1
    over, going = [], []
    for run in runs:
        try:
            if run.diverged:
                run.key.set_user_attr("diverged_in_unit", run.units)
                over.append((run, TrialState.PRUNED))
            elif run.units == problem.units:
                for name, limit in problem.config.constraints.items():
                    run.key.set_constraint(name, OBJECTIVES[name](run) - limit)
                over.append((run, TrialState.COMPLETE))
            elif single:
                run.key.report(run.score, run.units)
                going.append(run)
        except UpdateFinishedTrialError:  # others have taken it over: this process stood still for too long
            over.append((run, TrialState.PRUNED))
    # all have reported before any is judged, so that none is favoured by its place
    return over + [(run, TrialState.PRUNED) for run in going if run.key.should_prune()]


@dataclass(frozen=True)
class Candidate:
    """One of the best trials, trained again.

    Attributes:
        trial: its number.
        values: of the rule: what was searched.
        value: what the study holds; the mean over few seeds that it was chosen by.
        valid: normalised valid loss from fresh seeds.
        diverged: how many of those runs did.
    """

    trial: int
    values: dict[str, Any]
    value: float
    valid: Estimate
    diverged: int


@dataclass(frozen=True)
class Selection:
    """The winner and those that it beat.

    Attributes:
        candidates: the best first.
        test: raw test loss of the winner from further seeds.
        task: what they trained on.
        seeds: fresh training runs of each.
    """

    candidates: list[Candidate]
    test: Estimate
    task: str
    seeds: int

    @property
    def winner(self) -> Candidate:
        """The best."""
        return self.candidates[0]

    @property
    def ties(self) -> int:
        """Candidates, besides the winner, whose intervals overlap with its own: what these seeds cannot tell from it."""
        return sum(not other.valid.low > self.winner.valid.high for other in self.candidates[1:])


def select(problem: Problem, study: optuna.Study, *, top: int = 5, seeds: int = 8, on: str | None = None) -> Selection:
    """Train the best trials again from fresh seeds, and the winner's test runs.

    Args:
        problem: what the study is of.
        study: with at least one complete trial.
        top: how many; with several objectives, of the Pareto front. Those that break a constraint take no part.
        seeds: fresh runs of each candidate, and test runs of the winner.
        on: another task to choose on, such as a wider model where the learning rates are muP's; None: the study's.

    Raises:
        ValueError: no trial is complete and keeps the constraints.
    """
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    kept = [trial for trial in complete if all(excess <= 0 for excess in trial.constraints.values())]
    if not kept:
        raise ValueError(
            f"no trial of study {study.study_name!r} has finished and keeps the constraints "
            f"({len(complete)} are complete); widen the search, or give more trials"
        )
    if len(study.directions) > 1:
        front = {trial.number for trial in study.best_trials}
        kept = [trial for trial in kept if trial.number in front]
    ranked = sorted(kept, key=lambda trial: (trial.values[0], trial.number))
    # samplers repeat points of a small space
    best = [trial for i, trial in enumerate(ranked) if all(trial.params != other.params for other in ranked[:i])][:top]
    config = problem.config
    course = problem.course
    if on is not None:
        course = Course.of(registry.create("task", on, device=config.device), None, config.device, config.backend)
    stream, test_seeds = seed_streams(config.seed, course.name, config.seeds + seeds, seeds)
    fresh = stream[config.seeds :]  # the trials had those before
    together = Lockstep(course, problem.rule, fresh, 1)
    together.admit([Run(trial, problem.space.values(trial.params)) for trial in best])
    found = [
        Candidate(run.key.number, dict(run.values), run.key.values[0], estimate([run.scores]), run.diverged)
        for run in together.advance()
    ]
    found.sort(key=lambda candidate: (candidate.valid.iqm, candidate.trial))
    rule = problem.rule.replaced(**found[0].values)
    _, carry = course.train(rule, course.start(rule, test_seeds), course.steps, None)
    test = course.losses(carry, course.task.test, TEST_EXAMPLES)
    return Selection(found, estimate([test.tolist()]), course.name, seeds)


@dataclass(frozen=True)
class TuneResult:
    """A finished search.

    Attributes:
        problem: what was searched.
        study: with all trials.
        selection: the winner.
    """

    problem: Problem
    study: optuna.Study
    selection: Selection


def tune(
    config: TuneConfig,
    directory: Path | str,
    *,
    storage: str | None = None,
    name: str | None = None,
    batch: int = 16,
    top: int = 5,
    confirm_seeds: int = 8,
    select_on: str | None = None,
    enqueue: Sequence[Mapping[str, Any]] = (),
    progress: bool = True,
) -> TuneResult:
    """Search, or go on with the search that the study holds; then choose the winner and write the report.

    Args:
        config: of the search.
        directory: of the report, and of the study's journal unless ``storage`` says otherwise.
        storage: as `metaopt.tune.studies.open_storage` takes it; other processes join by ``metaopt worker``.
        name: of the study; None: optimizer and task.
        batch: trials that train together in this process.
        top: how many of the best trials train again.
        confirm_seeds: from how many fresh seeds.
        select_on: another task to choose on, as `select` takes it.
        enqueue: values of the rule to try first, in a new study; its own values come before them.
        progress: show a bar on stderr.

    Raises:
        ValueError: impossible settings, a study of other settings, or Optuna is not installed.
        KeyboardInterrupt: everything told is kept, and trials under way are in the queue again; the same call goes on.
    """
    require_optuna()
    from metaopt.tune import algorithms, report, studies

    problem = Problem(config)
    # what cannot run is refused before a study holds it, which would refuse the corrected settings
    algorithms.sampler(config.sampler, config.seed)
    algorithms.pruner(config.pruner, problem.units)
    problem.lockstep()
    if select_on is not None:
        registry.create("task", select_on, device=config.device)
    directory = Path(directory)
    name = name or study_name(config)
    check_directory(directory / report.RESULT_FILE, name)
    url = storage or f"journal:{directory / studies.STUDY_FILE}"
    study = studies.open_study(studies.open_storage(url), name, problem.settings(), len(config.objectives))
    first = not study.get_trials(deepcopy=False)
    if first:
        for values in ({**problem.rule.values()}, *enqueue):
            known = problem.space.params(values)
            if known:
                study.enqueue_trial(known)
    with report.live(study, config, progress) as show:
        work(problem, study, batch=batch, first=first, on_unit=show)
    selection = select(problem, study, top=top, seeds=confirm_seeds, on=select_on)
    report.save(problem, study, selection, directory)
    return TuneResult(problem, study, selection)


def join(
    storage: str,
    name: str,
    *,
    trials: int | None = None,
    batch: int = 16,
    grace: float | None = None,
    device: str | None = None,
) -> int:
    """Take part in a study that `tune` started, until it is complete; how many trials this process finished.

    Args:
        storage: as `metaopt.tune.studies.open_storage` takes it.
        name: of the study.
        trials: another budget than that of `tune`.
        batch: trials that train together here.
        grace: seconds without a heartbeat until a process counts as dead.
        device: where to compute here; None: as `tune`.

    Raises:
        ValueError: no such storage or study, or one whose optimizer, task or space is another here.
    """
    require_optuna()
    from metaopt.tune import studies

    opened = studies.open_storage(storage, existing=True)
    kept = studies.settings_of(opened, name)
    budget = trials or kept["trials"]
    problem = Problem(config_of(kept, budget))
    study = studies.open_study(opened, name, problem.settings(), len(problem.config.objectives))
    if device is not None:
        problem = Problem(dataclasses.replace(problem.config, device=device))
    return work(problem, study, batch=batch, grace=grace)


def study_name(config: TuneConfig) -> str:
    """What a study is called if nobody says."""
    return f"{config.optimizer} on {config.task}"


def require_optuna() -> None:
    """Raise ``ValueError`` where Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("a search needs the extra 'tune': pip install 'torch-metaopt[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def check_directory(path: Path, study: str) -> None:
    """Refuse to replace the result of another search.

    Args:
        path: the file that would be replaced; what it holds names its ``study``.
        study: whose result is to be written.

    Raises:
        ValueError: it is of another one.
    """
    kept = json.loads(path.read_text()).get("study", study) if path.exists() else study
    if kept != study:
        raise ValueError(f"{path.parent} holds the result of {kept}, not of {study}; choose another directory (--out)")
