"""How good losses are: policies trained with many of them at once, judged by a reward that no loss sees.

Every candidate gets the same tuning: the loss of its best setting among all scales of the log-probabilities (what beta is in
DPO) and learning rates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Generator, Tensor

from metaopt import registry, tree
from metaopt.objective import LOG_PROBABILITIES, Objective
from metaopt.random import hash64, sample_indices
from metaopt.rule import Params
from metaopt.task import Batch, Split
from metaopt_symbolic.proposals.candidate import CandidateScore

AT_ONCE = 16
"""Losses that are trained together: more of them fill a CPU's caches."""

SCALES = (0.0625, 0.25, 1.0, 4.0)
"""Of log-probabilities, for losses with a beta of 0.05."""

RATES = (0.1, 0.3, 1.0)
"""Learning rates of Adam, at the first step; they fall to 0."""


TASK = "preference_clean_dpo_linear"
"""The registered task that regimes vary; its objective takes no part."""


class PreferenceTask(Protocol):
    """What is asked of a task of learning from preferences, beside what `metaopt.task.Task` has."""

    train: Split
    valid: Split
    test: Split
    batch_size: int

    def init(self, generator: Generator) -> Params:
        """See `metaopt.task.Task.init`."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """See `metaopt.task.Task.loss`: minus the expected reward."""

    def normalize(self, loss: Tensor) -> Tensor:
        """See `metaopt.task.Task.normalize`: 1 is the reference policy, 0 the best answers."""

    def pairs(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Log-probabilities [B] of ranked pairs, by the names of `metaopt.objective.LOG_PROBABILITIES`, and more."""

    def win_rate(self, params: Params, batch: Batch) -> Tensor:
        """How often the policy's answer has the higher reward than the reference's."""

    def kl(self, params: Params, batch: Batch) -> Tensor:
        """KL(policy || reference), in nats."""


@dataclass(frozen=True)
class Regime:
    """A task as numbers, so that a search can be described and repeated.

    Attributes:
        name: of the task.
        arguments: of the task `TASK`, in the place of its own.
    """

    name: str
    arguments: Mapping[str, Any]

    def task(self) -> PreferenceTask:
        """The task."""
        made: PreferenceTask = registry.create("task", TASK, name=self.name, **self.arguments)
        return made


@dataclass(frozen=True)
class Stage:
    """Runs that each loss of a stage makes, and how many losses go on.

    Attributes:
        regimes: what is trained.
        horizon: steps of a run.
        seeds: of initial parameters and batches, the same for all losses.
        keep: share of the distinct scores seen so far that are good enough for the next stage, in (0, 1].
    """

    regimes: tuple[Regime, ...]
    horizon: int
    seeds: tuple[int, ...]
    keep: float = 0.3


@dataclass(frozen=True)
class Score(CandidateScore):
    """How good a loss is: the mean normalised expected reward, negated, on the validation split.

    1 is the reference policy, 0 the best answers; each stage that was not reached costs `UNREACHED` more.

    Attributes:
        low, high: 95 % interval of ``loss`` over seeds; NaN from one seed.
        scale, rate: the setting with these losses.
    """

    low: float
    high: float
    scale: float
    rate: float

    @property
    def text(self) -> str:
        """With its interval."""
        return f"{self.loss:.4f} [{self.low:.4f}, {self.high:.4f}]"

    def later(self, stage: int, unreached: float) -> Score:
        """The same score, of a stage after which others, that cost ``unreached``, were not reached."""
        more = {name: getattr(self, name) + unreached for name in ("loss", "low", "high")}
        return dataclasses.replace(self, stage=stage, **more)


UNREACHED = 3.0
"""More than normalised losses (at most 1.5) differ by, so that losses of a later stage come first."""


def _regime(name: str, data: str, **arguments: Any) -> Regime:
    return Regime(name, {"data": data, **arguments})


def search_stages() -> tuple[Stage, ...]:
    """What a search is scored on: two short runs; then four tasks, several seeds. Flips of 0, 0.2 and 0.4."""
    noisy = _regime("noisy", "preferences_noisy", seed=11)
    linear = [
        _regime("clean", "preferences_clean", seed=10),
        _regime("very_noisy", "preferences_noisy", seed=12, flips=0.4),
        _regime("shuffled", "preferences_shuffled", seed=13),
    ]
    return Stage((noisy,), 40, (0,)), Stage((noisy, *linear), 120, (1, 2, 3))


def selection_stage() -> Stage:
    """On what the winner is selected among the elites: noise levels that neither the search nor the report has."""
    regimes = [
        _regime(f"flips_{flips:g}", "preferences_noisy", seed=20 + k, flips=flips) for k, flips in enumerate((0.1, 0.3))
    ]
    return Stage(tuple(regimes), 120, tuple(range(10, 16)))


def report_stage() -> Stage:
    """On what a winner is reported: noise levels, policies and rewards that nothing was chosen by."""
    linear = [
        _regime(f"flips_{flips:g}", "preferences_noisy", seed=30 + k, flips=flips)
        for k, flips in enumerate((0.15, 0.25, 0.35))
    ]
    wide = [
        _regime("hidden_16", "preferences_noisy", seed=33, flips=0.25, hidden=(16,)),
        _regime("curved_hidden_32", "preferences_curved_noisy", seed=34, flips=0.25, hidden=(32,)),
    ]
    return Stage((*linear, *wide), 200, tuple(range(100, 110)))


# -- training ------------------------------------------------------------------------------------------------------------


MEASURES: Mapping[str, Callable[[PreferenceTask, Params, Batch], Tensor]] = {
    "loss": lambda task, params, batch: task.normalize(task.loss(params, batch)),
    "win_rate": lambda task, params, batch: task.win_rate(params, batch),
    "kl": lambda task, params, batch: task.kl(params, batch),
}
"""What policies are judged by; the loss is normalised, and the worst of all where it is no number."""


def train(
    task: PreferenceTask,
    objectives: Sequence[Objective],
    *,
    horizon: int,
    seeds: Sequence[int],
    scales: Sequence[float] = SCALES,
    rates: Sequence[float] = RATES,
    split: str = "valid",
) -> Tensor:
    """Normalised losses at the end: float64 [N, C, M, S]; see `measured`."""
    return measured(task, objectives, "loss", horizon=horizon, seeds=seeds, scales=scales, rates=rates, split=split)[0]


def measured(
    task: PreferenceTask,
    objectives: Sequence[Objective],
    *measures: str,
    horizon: int,
    seeds: Sequence[int],
    scales: Sequence[float] = SCALES,
    rates: Sequence[float] = RATES,
    split: str = "valid",
) -> Tensor:
    """Train a policy with each objective, scale, learning rate and seed, by Adam whose learning rate falls linearly to 0.

    Initial parameters and batches of a seed are those of `metaopt.unroll.unroll`, whatever the objective.

    Args:
        task: whose own objective takes no part.
        objectives: N of them, of kind ``preference``.
        *measures: of policies at the end, by their names in `MEASURES`.
        horizon: steps of a run.
        seeds: S of them.
        scales: C factors of the log-probabilities that objectives see.
        rates: M learning rates.
        split: ``valid`` or ``test``: where policies are judged.

    Returns:
        float64 [measures, N, C, M, S].
    """
    shape = len(rates), len(objectives), len(scales)
    own = torch.tensor(seeds, dtype=torch.int64)
    first = [task.init(Generator().manual_seed(int(seed))) for seed in hash64(own)]
    copies = math.prod(shape[1:])
    params = [
        {name: stacked[:, None].repeat(1, copies, *[1] * (stacked.dim() - 1)) for name, stacked in tree.stack(first).items()}
        for _ in rates
    ]  # fmt: skip
    groups = [{"params": [p.requires_grad_() for p in own_params.values()], "lr": rate}
              for own_params, rate in zip(params, rates, strict=True)]  # fmt: skip
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / horizon, horizon - 1)
    factors = torch.tensor(scales, dtype=torch.float32)[:, None]
    pairs = torch.vmap(torch.vmap(task.pairs, (0, None)))
    steps = torch.arange(horizon).repeat_interleave(len(seeds))
    drawn = sample_indices(own.repeat(horizon), steps, task.batch_size, len(task.train)).unflatten(0, (horizon, -1))
    for indices in drawn:
        batch = {name: t[indices] for name, t in task.train.tensors.items()}
        _gradients(pairs(_joined(params), batch), objectives, shape, factors, optimizer)
        optimizer.step()
        schedule.step()
    judged = getattr(task, split).tensors
    policies = _joined(params)
    with torch.no_grad():
        found = [torch.vmap(torch.vmap(partial(MEASURES[name], task), (0, None)), (0, None))(policies, judged)
                 for name in measures]  # fmt: skip
    return torch.stack(found).unflatten(2, shape).permute(0, 3, 4, 2, 1).double()


def _joined(params: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([p[name] for p in params], 1) for name in params[0]}


def _gradients(
    pairs: Mapping[str, Tensor], objectives: Sequence[Objective], shape: tuple[int, int, int], factors: Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Of the sum of all runs' mean losses; ``pairs`` are [S, copies, B]."""
    read = {name for objective in objectives for name in objective.inputs}
    chosen, rejected, reference_chosen, reference_rejected = (pairs[name] for name in LOG_PROBABILITIES)
    inputs = {**pairs, "rho": (chosen - reference_chosen) - (rejected - reference_rejected)}
    seen = {}
    for name in read:
        x = inputs[name].unflatten(1, shape)
        seen[name] = (factors * x if name == "rho" or name in LOG_PROBABILITIES else x).unbind(2)
    total = torch.zeros(())
    for k, objective in enumerate(objectives):
        given = {name: seen[name][k] for name in objective.inputs}
        total = total + _of_copies(objective, given).mean(-1).sum()
    optimizer.zero_grad()
    total.backward()


def _of_copies(objective: Objective, inputs: Mapping[str, Tensor]) -> Tensor:
    """Losses of inputs [..., B]; what depends on the batch sees one copy's at a time."""
    if not objective.batch_dependent:
        return objective(inputs)
    columns = {name: x.flatten(0, -2) for name, x in inputs.items()}
    return torch.vmap(objective)(columns)


# -- judging -------------------------------------------------------------------------------------------------------------


class Judge:
    """Scores losses in stages of rising cost, and remembers what scores its stages have seen.

    Successive halving as in `metaopt_symbolic.cascade.Cascade`: how far a loss gets depends on those before it, what it scores
    there on itself alone.

    Args:
        stages: at least one; the last one drops nobody.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._tasks: dict[str, PreferenceTask] = {}
        self._seen: list[list[float]] = [[] for _ in self.stages]

    def describe(self) -> list[dict[str, Any]]:
        """The stages, as JSON holds them: searches with others do not mix."""
        return [dataclasses.asdict(stage) for stage in self.stages]

    def scores(self, objectives: Sequence[Objective]) -> list[Score]:
        """One score per objective."""
        found: dict[int, Score] = {}
        going = [*range(len(objectives))]
        for number, stage in enumerate(self.stages):
            if not going:
                break
            own = self.scores_on(stage, [objectives[k] for k in going])
            unreached = UNREACHED * (len(self.stages) - 1 - number)
            own = [score.later(number, unreached) for score in own]
            found.update(zip(going, own, strict=True))
            hurdle = self._hurdle(number, [score.loss for score in own])
            going = [k for k in going if found[k].loss <= hurdle]
        return [found[k] for k in range(len(objectives))]

    def scores_on(self, stage: Stage, objectives: Sequence[Objective]) -> list[Score]:
        """One score per objective, on one stage alone."""
        return [_score(stage, losses) for losses in self.losses(stage, objectives)]

    def losses(self, stage: Stage, objectives: Sequence[Objective]) -> Tensor:
        """float64 [N, tasks, C, M, S], see `train`."""
        parts = []
        for k in range(0, len(objectives), AT_ONCE):
            some = objectives[k : k + AT_ONCE]
            of = [train(self._task(regime), some, horizon=stage.horizon, seeds=stage.seeds) for regime in stage.regimes]
            parts.append(torch.stack(of, 1))
        return torch.cat(parts)

    def state(self) -> list[list[float]]:
        """What `restore` takes, as JSON holds it."""
        return [[*seen] for seen in self._seen]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Go on as the judge of the same stages whose `state` this is."""
        self._seen = [[*seen] for seen in state]

    def _task(self, regime: Regime) -> PreferenceTask:
        key = repr(regime)
        if key not in self._tasks:
            self._tasks[key] = regime.task()
        return self._tasks[key]

    def _hurdle(self, number: int, losses: Sequence[float]) -> float:
        """Up to what loss a candidate goes on, when these are added to those seen."""
        self._seen[number] += losses
        distinct = np.unique(self._seen[number])
        if len(distinct) <= UNJUDGED:
            return math.inf
        return float(np.quantile(distinct, self.stages[number].keep))


UNJUDGED = 10
"""How many distinct scores a stage lets pass before it judges."""


def _score(stage: Stage, losses: Tensor) -> Score:
    """Of one loss: [tasks, C, M, S]."""
    best, (scale, rate) = best_setting(losses)
    by_task = dict(zip((regime.name for regime in stage.regimes), best.mean(1).tolist(), strict=True))
    mean, margin = float(best.mean()), margin_of(best.mean(0).numpy())
    return Score(mean, 0, by_task, mean - margin, mean + margin, scale, rate)


def best_setting(losses: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The losses [tasks, S] of the scale and learning rate whose mean is least, and these, from [tasks, C, M, S]."""
    mean = losses.mean((0, 3))
    k = int(mean.argmin())
    scale, rate = [*itertools.product(SCALES, RATES)][k]
    return losses.flatten(1, 2)[:, k], (scale, rate)


def margin_of(values: NDArray[np.float64]) -> float:
    """Half the width of the 95 % interval of a mean of independent values, by Student's t; NaN of a single one."""
    count = len(values)
    if count < 2:
        return math.nan
    return float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))
