"""Samplers and pruners by name, as Optuna 5 has them, and one pruner for trials that run in lock-step."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna import pruners, samplers
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

SAMPLERS: dict[str, Callable[[int | None], BaseSampler]] = {
    "tpe": lambda seed: samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed),
    "random": lambda seed: samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: samplers.QMCSampler(scramble=True, seed=seed, warn_asynchronous_seeding=False),
    "gp": lambda seed: samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: _cmaes(seed),
    "nsga2": lambda seed: samplers.NSGAIISampler(seed=seed),
}
"""Name -> sampler for a seed. ``gp`` is for few continuous dimensions and slow trials, ``cmaes`` (its package) for many."""

PRUNERS: dict[str, Callable[[int], BasePruner]] = {
    "lockstep": lambda units: LockstepHalving(),
    "median": lambda units: pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    "patient": lambda units: pruners.PatientPruner(pruners.MedianPruner(n_startup_trials=5), patience=1),
    "asha": lambda units: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "hyperband": lambda units: pruners.HyperbandPruner(min_resource=1, max_resource=units, reduction_factor=3),
    "none": lambda units: pruners.NopPruner(),
}
"""Name -> pruner for a number of budget units."""


class LockstepHalving(BasePruner):
    """At rungs 2, 4, 8, ... only the better half of all trials that have reported there go on.

    Unlike Optuna's own pruners it compares with trials that are still running, which in lock-step are most of them.
    Successive halving of Jamieson and Talwalkar, 2016 (https://arxiv.org/abs/1502.07943); reports of later trials count too.

    Args:
        least: reports at a rung below which nothing is pruned.
    """

    def __init__(self, least: int = 4) -> None:
        self.least = least

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether ``trial`` is in the worse half at the rung that it has reported last."""
        rung = trial.last_step
        if rung is None or rung < 2 or rung & (rung - 1):
            return False
        reports = [other.intermediate_values.get(rung) for other in study.get_trials(deepcopy=False)]
        values = sorted(value for value in reports if value is not None and math.isfinite(value))
        if study.direction == optuna.study.StudyDirection.MAXIMIZE:
            values.reverse()
        if len(values) < self.least:
            return False
        bar, own = values[(len(values) - 1) // 2], trial.intermediate_values[rung]
        return own < bar if study.direction == optuna.study.StudyDirection.MAXIMIZE else own > bar


def sampler(name: str, seed: int | None) -> BaseSampler:
    """The sampler of that name; without a seed, its numbers differ from run to run.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return _named("sampler", SAMPLERS, name)(seed)
        except ImportError as error:
            raise ValueError(f"sampler {name!r} needs a package that is not installed: {error}") from error


def pruner(name: str, units: int) -> BasePruner:
    """The pruner of that name, for trials of ``units`` budget units.

    Raises:
        ValueError: an unknown name.
    """
    return _named("pruner", PRUNERS, name)(units)


def _cmaes(seed: int | None) -> BaseSampler:
    importlib.import_module("cmaes")  # which Optuna imports only when it samples
    return samplers.CmaEsSampler(seed=seed)


def _named(kind: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"{kind} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
