"""Optuna for users' own training loops: a sampler that begins in good regions, and a callback that reports and prunes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import Tensor

from metaopt import registry
from metaopt.evaluate.baseline import baseline_of
from metaopt.resolve import resolve_rule
from metaopt.rule import flat_hp
from metaopt.space import Hyper
from metaopt.tune.algorithms import sampler


def priors(optimizer: str) -> list[dict[str, float]]:
    """Points worth trying first with an optimizer, the best first: values by name, entries of tuples as ``beta1``, ``beta2``.

    These are the declared defaults; then, where the installed archive of baselines was made with this optimizer, the
    defaults with the quartiles of the learning rates that tuning found over its tasks, else with the middle of the declared
    search range.
    """
    rule = resolve_rule(optimizer)
    own = {name: float(value) for name, value in flat_hp(rule.hp).items()}
    curves = [baseline_of(task) for task in registry.specs("task")]
    tuned = [curve.lr for curve in curves if curve is not None and curve.rule == optimizer]
    if tuned:
        rates = [float(rate) for rate in np.quantile(tuned, [0.5, 0.25, 0.75])]
    else:
        declared = rule.declared().get("lr")
        rates = declared.grid(3)[1:2] if isinstance(declared, Hyper) and declared.search else []
    return [own, *({**own, "lr": rate} for rate in rates)]


class PriorSampler(BaseSampler):
    """Another sampler, but the first trials take given values wherever a trial asks for one of their names.

    Args:
        points: values by name, one mapping per trial; a value outside the range that the trial asks for is left to ``then``.
        then: samples the rest.
    """

    def __init__(self, points: Sequence[Mapping[str, float]], then: BaseSampler) -> None:
        self.points, self.then = list(points), then

    def reseed_rng(self) -> None:
        """See `optuna.samplers.BaseSampler`, as for all that follow."""
        self.then.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None for the first trials, whose values are not sampled."""
        return {} if trial.number < len(self.points) else self.then.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The other sampler's."""
        return self.then.sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The given value, where there is one."""
        given = self.points[trial.number].get(param_name) if trial.number < len(self.points) else None
        # a distribution with steps, or of integers, would need the value rounded: then it is no prior of ours
        if (
            given is not None
            and isinstance(param_distribution, FloatDistribution)
            and param_distribution.step is None
            and param_distribution.low <= given <= param_distribution.high
        ):
            return given
        return self.then.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """The other sampler's."""
        self.then.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """The other sampler's."""
        self.then.after_trial(study, trial, state, values)


def sampler_for(optimizer: str, seed: int | None = None) -> BaseSampler:
    """A sampler for studies of an optimizer's hyperparameters: `priors` first, then TPE.

    It goes by the names that trials ask for: ``lr``, ``weight_decay``, ``beta1``, ... as metaopt declares them::

        study = optuna.create_study(sampler=sampler_for("adamw"))
        study.optimize(lambda trial: train(lr=trial.suggest_float("lr", 1e-5, 1e-1, log=True)), n_trials=50)

    Raises:
        ValueError: nothing of that name.
    """
    return PriorSampler(priors(optimizer), sampler("tpe", seed))


def pruning_callback(trial: Trial, every: int = 100, smoothing: float = 0.9) -> Callable[[int, float | Tensor], None]:
    """For an ordinary training loop: call the result as ``callback(step, loss)`` after each step.

    The running mean of the loss, bias-corrected, is reported once in ``every`` steps, as budget units 1, 2, ...

    Args:
        trial: of a study that minimises.
        every: steps between two reports.
        smoothing: weight of the past in the running mean, in [0, 1).

    Returns:
        the callback, which raises `optuna.TrialPruned` where the study's pruner says so, and where the loss is not finite.
    """
    if every < 1 or not 0 <= smoothing < 1:
        raise ValueError(f"every must be at least 1 and smoothing in [0, 1), got {every} and {smoothing}")
    mean, calls = 0.0, 0

    def callback(step: int, loss: float | Tensor) -> None:
        nonlocal mean, calls
        loss = loss.item() if isinstance(loss, Tensor) else float(loss)
        if not math.isfinite(loss):
            raise optuna.TrialPruned(f"the loss at step {step} is {loss}")
        mean, calls = smoothing * mean + (1 - smoothing) * loss, calls + 1
        if (step + 1) % every == 0:
            trial.report(mean / (1 - smoothing**calls), (step + 1) // every)
            if trial.should_prune():
                raise optuna.TrialPruned(f"behind other trials at step {step}")

    return callback
