"""Hyperparameters of meta-training through Optuna: a study whose trials are meta-training runs, or a population of them.

With one generation the study samples trials (TPE) and prunes those whose score falls behind the median of the others at the
same evaluation. With several it is population-based training (Jaderberg et al. 2017, arXiv:1711.09846): each generation goes
on from the thetas of the one before; members of its worst quarter go on from one of the best quarter instead, with
hyperparameters multiplied by 0.8 or 1.25. (A run goes on with its theta; outer momenta and inner runs begin anew.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.trainer import meta_train

if TYPE_CHECKING:
    import optuna

SPACE: Mapping[str, tuple[float, float]] = {
    "outer_lr": (1e-4, 1e-1),
    "estimator_options.sigma": (1e-3, 1e-1),
    "clip_norm": (0.1, 10.0),
}
"""What is searched if nothing else is said: setting, or setting.option, and its ends; on a log scale."""

STUDY_FILE, BEST_FILE = "study.log", "best.json"


@dataclass(frozen=True)
class TuneResult:
    """The best trial.

    Attributes:
        score: of its best evaluation.
        settings: what was searched, by name.
        directory: of its run, which holds its theta.
    """

    score: float
    settings: dict[str, float]
    directory: Path


def meta_tune(
    config: MetaTrainConfig,
    directory: Path | str,
    *,
    trials: int = 20,
    generations: int = 1,
    space: Mapping[str, tuple[float, float]] = SPACE,
    progress: bool = True,
) -> TuneResult:
    """Search settings of meta-training, or go on with the search that ``directory`` holds.

    Each trial is a run in a directory of its own. One process works on a search at a time; one that was killed goes on
    with the same command, its unfinished trial from that run's checkpoint. Writes ``study.log`` (an Optuna journal, for
    ``optuna-dashboard``) and ``best.json``.

    Args:
        config: of every trial but for what is searched; must evaluate.
        directory: of the search.
        trials: runs per generation; with several generations at least 4, the size of the population.
        generations: see the module.
        space: setting -> (low, high), above 0, searched on a log scale; ``estimator_options.sigma`` is an option. Where
            both ends are integers, only integers are tried.
        progress: whether to say how each trial went.

    Raises:
        ValueError: no evaluation, an impossible range, the search of another config, several processes, or Optuna is not
            installed; or a trial that cannot run, which is marked as failed.
        KeyboardInterrupt: as `meta_train`.
    """
    _check(config, trials, generations, space)
    directory = Path(directory)
    study = _study(config, directory, generations, space)
    say = Console(stderr=True, quiet=not progress, soft_wrap=True).print
    while (trial := _next_trial(study, config.seed, trials, generations, space)) is not None:
        score = _train(study, trial, config, directory)
        said = ", ".join(f"{name}={value:.3g}" for name, value in trial.params.items())
        say(f"trial {trial.number}: " + ("pruned" if score is None else f"score {score:.3f}") + f" with {said}")
    best = study.best_trial
    result = TuneResult(float(best.values[0]), dict(best.params), directory / best.user_attrs["run"])
    write_atomic(directory / BEST_FILE, json.dumps(dataclasses.asdict(result), indent=2, default=str) + "\n")
    return result


def with_settings(config: MetaTrainConfig, settings: Mapping[str, float]) -> MetaTrainConfig:
    """The config with settings, or with options as ``estimator_options.sigma``, replaced.

    Raises:
        ValueError: no such setting.
    """
    for name, value in settings.items():
        field, dot, option = name.partition(".")
        if not hasattr(config, field) or (dot and not field.endswith("_options")):
            raise ValueError(f"meta-training has no setting {name!r}; write outer_lr, or estimator_options.sigma")
        new: Any = {**getattr(config, field), option: value} if dot else value
        config = dataclasses.replace(config, **{field: new})
    return config


def _check(config: MetaTrainConfig, trials: int, generations: int, space: Mapping[str, tuple[float, float]]) -> None:
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"a search runs in 1 process, got WORLD_SIZE={world}; start it without torchrun")
    if not config.evaluate_every:
        raise ValueError("a search compares scores; set evaluate_every and evaluate_on")
    for name, value, least in (("trials", trials, 1 if generations == 1 else 4), ("generations", generations, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, (low, high) in space.items():
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"the range of {name} must be 0 < low < high, got {low} and {high}; it is searched on a log scale"
            )
    for end in (0, 1):
        tried = with_settings(config, {name: ends[end] for name, ends in space.items()})
        registry.create("learned_optimizer", tried.learned, **tried.learned_options)
        registry.create("estimator", tried.estimator, **tried.estimator_options)


def _study(
    config: MetaTrainConfig, directory: Path, generations: int, space: Mapping[str, tuple[float, float]]
) -> optuna.Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ValueError("a search needs the extra 'tune': pip install 'torch-metaopt[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(directory / STUDY_FILE)))
    study = optuna.create_study(storage=storage, study_name="meta-tune", direction="maximize", load_if_exists=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if generations == 1 else optuna.pruners.NopPruner()
    # its random numbers are not stored: those of a search that goes on shall not repeat
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    asked = json.loads(json.dumps({**dataclasses.asdict(config), "space": dict(space)}))
    for name, value in study.user_attrs.get("asked", asked).items():
        if asked.get(name) != value:
            raise ValueError(
                f"{directory} holds a search with {name}={value!r}, not {asked.get(name)!r}; "
                f"give the same settings to go on with it, or choose another directory"
            )
    study.set_user_attr("asked", asked)
    return study


def _next_trial(
    study: optuna.Study, seed: int, trials: int, generations: int, space: Mapping[str, tuple[float, float]]
) -> optuna.Trial | None:
    """The next one; None when all are finished. One that a killed process left is put in the queue again."""
    from optuna.distributions import FloatDistribution, IntDistribution
    from optuna.trial import TrialState

    for left in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(left.number, state=TrialState.FAIL)
        study.enqueue_trial(left.params, user_attrs=left.user_attrs)
    finished = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    if len(finished) >= trials * generations:
        return None
    waiting = study.get_trials(states=(TrialState.WAITING,))
    if len(finished) >= trials and not waiting:
        first = len(finished) // trials * trials
        member = len(finished) - first
        settings, parent = _descendant(
            finished[first - trials : first], member, random.Random(f"{seed} {len(finished)}"), space
        )
        study.enqueue_trial(settings, user_attrs={"parent": parent})
    return study.ask(
        {
            name: IntDistribution(int(low), int(high), log=True)
            if _is_integer(low, high)
            else FloatDistribution(low, high, log=True)
            for name, (low, high) in space.items()
        }
    )


def _is_integer(low: float, high: float) -> bool:
    return isinstance(low, int) and isinstance(high, int)


def _descendant(
    population: Sequence[optuna.trial.FrozenTrial],
    member: int,
    rng: random.Random,
    space: Mapping[str, tuple[float, float]],
) -> tuple[dict[str, float], str]:
    """Settings of a member of the next generation, and the run that it goes on from."""
    ranked = sorted(population, key=lambda trial: (-float(trial.values[0]), trial.number))
    quarter = len(ranked) // 4
    own = population[member]
    if own not in ranked[-quarter:]:
        return own.params, own.user_attrs["run"]
    better = rng.choice(ranked[:quarter])
    settings = {}
    for name, (low, high) in space.items():
        moved = better.params[name] * rng.choice((0.8, 1.25))
        settings[name] = min(max(round(moved) if _is_integer(low, high) else moved, low), high)
    return settings, better.user_attrs["run"]


def _train(study: optuna.Study, trial: optuna.Trial, config: MetaTrainConfig, directory: Path) -> float | None:
    """The trial's score; None if it was pruned."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    run, parent = trial.user_attrs.get("run", f"trial_{trial.number:04}"), trial.user_attrs.get("parent")
    trial.set_user_attr("run", run)
    config = with_settings(config, trial.params)
    if parent is not None:
        config = dataclasses.replace(config, init_theta=str(directory / parent))

    def report(step: int, score: float) -> None:
        trial.report(score, step)
        if trial.should_prune():
            raise TrialPruned

    try:
        best = meta_train(config, directory / run, progress=False, on_evaluation=report).best
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return None
    except ValueError as error:
        study.tell(trial, state=TrialState.FAIL)
        raise ValueError(f"trial {trial.number} with {trial.params} cannot run: {error}") from error
    assert best is not None
    study.tell(trial, best[0])
    return best[0]
