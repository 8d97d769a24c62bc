"""Fitness of candidates in stages of rising cost: what is poor on few short runs is not trained further.

Successive halving with the hurdles of AutoML-Zero (Real et al., 2020, https://arxiv.org/abs/2003.03384): a candidate goes on if
its score is among the best of all distinct scores that its stage has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metaopt.evaluate import split_losses
from metaopt.program.population import encode
from metaopt.program.program import Program
from metaopt.task import Task
from metaopt.unroll import fresh_params
from metaopt_symbolic.evaluate import train

LEAST_HORIZONS = 3
"""Of a stage. Runs of one length teach a search to ignore the schedule (a constant learning rate wins where all is short)."""

WORST = 2.0
"""Normalised losses lie in [-WORST, WORST], which keeps the fitness of one stage apart from that of the next."""

REMEMBERED, UNJUDGED = 2000, 10
"""How many of its latest scores a stage judges by, and how many distinct ones it lets pass first."""


@dataclass(frozen=True)
class Stage:
    """Runs that each candidate of the stage makes, and how many candidates go on.

    Attributes:
        tasks: names of tasks of the cascade.
        horizons: at least three different ones.
        seeds: of initial parameters and batches, the same for all candidates.
        multipliers: of the learning rate; a candidate has the loss of its best one, the same for all horizons.
        own_rates: whether each task has a best multiplier of its own, else one for all.
        keep: share of the distinct scores seen so far that are good enough for the next stage, in (0, 1].

    Raises:
        ValueError: fewer horizons, or ``keep`` outside its domain.
    """

    tasks: tuple[str, ...]
    horizons: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    multipliers: tuple[float, ...] = (1.0,)
    own_rates: bool = False
    keep: float = 0.25

    def __post_init__(self) -> None:
        if len(set(self.horizons)) < LEAST_HORIZONS:
            raise ValueError(
                f"horizons must be at least {LEAST_HORIZONS} different ones, got {self.horizons}; "
                "with fewer, programs that ignore the schedule win"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")

    @property
    def cost(self) -> int:
        """Updates of one candidate."""
        return len(self.tasks) * sum(self.horizons) * len(self.seeds) * len(self.multipliers)


@dataclass(frozen=True)
class Score:
    """How good a candidate is.

    Attributes:
        fitness: the larger the better: minus the mean normalised validation loss at the end of the last stage. Each stage that
            was not reached costs ``2 * WORST`` more, so that candidates of a later stage come first.
        stage: the last one that was run, from 0.
        losses: of that stage, by task: the mean over horizons and seeds.
        multiplier: the one with these losses; where tasks have their own, the median.
        diverged: share of all runs of the stage that diverged.
        updates: inner steps that were planned for it, over all stages.
    """

    fitness: float
    stage: int
    losses: Mapping[str, float]
    multiplier: float
    diverged: float
    updates: int


class Cascade:
    """Scores candidates, and remembers what scores its stages have seen.

    Losses depend on the candidate alone. How far it gets also depends on those before it and on those of the same call, but not
    on their order within it.

    Args:
        tasks: by name; their normalised losses must lie in [-2, 2], as those of all bounded tasks do.
        stages: at least one; the last one drops nobody.

    Raises:
        ValueError: no stage, a stage with a task that is not there, or a task without bounds.
    """

    def __init__(self, tasks: Mapping[str, Task], stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("a cascade needs at least one stage, got none")
        for name in sorted({name for stage in stages for name in stage.tasks}):
            if name not in tasks:
                raise ValueError(f"a stage names the task {name!r}; there are {', '.join(tasks)}")
            ends = tasks[name].normalize(torch.tensor([math.nan, math.inf, -math.inf]))
            if float(ends.abs().max()) > WORST:
                raise ValueError(
                    f"normalised losses of {name} must be in [-{WORST}, {WORST}], they reach {ends.tolist()}"
                )
        self.tasks, self.stages = dict(tasks), tuple(stages)
        self._seen: list[list[float]] = [[] for _ in stages]
        self._starts: dict[tuple[str, tuple[int, ...]], float] = {}

    def scores(self, programs: Sequence[Program]) -> list[Score]:
        """One score per program over the scalars ``lr`` and ``t``: see `train`."""
        found: dict[int, Score] = {}
        going, updates = list(range(len(programs))), 0
        for number, stage in enumerate(self.stages):
            if not going:
                break
            updates += stage.cost
            left = len(self.stages) - 1 - number
            by_task, multipliers, diverged = self._trained(stage, [programs[k] for k in going])
            losses = by_task.mean(1)
            for k, own, multiplier, lost, loss in zip(going, by_task, multipliers, diverged, losses, strict=True):
                named = dict(zip(stage.tasks, own.tolist(), strict=True))
                fitness = -float(loss) - 2 * WORST * left
                found[k] = Score(fitness, number, named, float(multiplier), float(lost), updates)
            hurdle = min(self._hurdle(number, losses.tolist()), self._start(stage))
            going = [k for k, loss in zip(going, losses, strict=True) if loss < hurdle]
        return [found[k] for k in range(len(programs))]

    def state(self) -> dict[str, Any]:
        """What `restore` takes: plain lists of numbers."""
        return {"seen": [list(seen) for seen in self._seen]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the cascade of the same stages whose `state` this is.

        Raises:
            ValueError: a state of another number of stages.
        """
        if len(state["seen"]) != len(self.stages):
            raise ValueError(f"the state is of {len(state['seen'])} stages, this cascade has {len(self.stages)}")
        self._seen = [[float(loss) for loss in seen] for seen in state["seen"]]

    def _trained(self, stage: Stage, programs: Sequence[Program]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses [N, tasks] at the best multiplier, that multiplier [N], and shares of diverged runs [N]."""
        population = encode(programs)
        losses, diverged = [], []
        for name in stage.tasks:
            runs = [
                train(self.tasks[name], population, horizon=h, seeds=stage.seeds, multipliers=stage.multipliers)
                for h in stage.horizons
            ]
            losses.append(torch.stack([run.losses[..., -1].mean(2) for run in runs]).mean(0))
            diverged += [(run.diverged >= 0).double().mean((1, 2)) for run in runs]
        by_multiplier = torch.stack(losses, 2)  # [N, multipliers, tasks]
        if stage.own_rates:
            best = by_multiplier.argmin(1)
        else:
            best = by_multiplier.mean(2).argmin(1)[:, None].expand(-1, len(losses))
        own = by_multiplier.gather(1, best[:, None]).squeeze(1)
        middle = best.sort(1).values[:, (len(losses) - 1) // 2]  # torch 2.13: the median of an expanded tensor is wrong
        multipliers = np.asarray(stage.multipliers)[middle.numpy()]
        return own.numpy(), multipliers, torch.stack(diverged).mean(0).numpy()

    def _hurdle(self, number: int, losses: Sequence[float]) -> float:
        """Below what loss a candidate goes on, when these are added to those seen."""
        self._seen[number] = [*self._seen[number], *losses][-REMEMBERED:]
        distinct = np.unique(self._seen[number])
        if len(distinct) <= UNJUDGED:
            return math.inf
        return float(np.nextafter(np.quantile(distinct, self.stages[number].keep), math.inf))

    def _start(self, stage: Stage) -> float:
        """The loss of untrained parameters: who does not fall below it has learnt nothing."""
        for name in stage.tasks:
            key = (name, stage.seeds)
            if key not in self._starts:
                task = self.tasks[name]
                params = fresh_params([task] * len(stage.seeds), torch.tensor(stage.seeds))
                config = {k: v.expand(len(stage.seeds), *v.shape) for k, v in (task.config | task.buffers()).items()}
                self._starts[key] = float(task.normalize(split_losses(task, params, task.valid, config)).mean())
        return sum(self._starts[name, stage.seeds] for name in stage.tasks) / len(stage.tasks)


def usual_stages(tasks: Sequence[str]) -> tuple[Stage, ...]:
    """Three stages: short runs on the first two tasks, longer ones on the first four, and all tasks with two seeds.

    Each tries three learning rates, so that what a change does to the step size hides nothing else that it does. Of 700
    children of AdamW on the suite ``search``, half learnt nothing; over the others, the rank correlations of two such first
    stages with the last were 0.92 and 0.95, and the ten best were in the best quarter of the first.
    """
    rates = (0.3, 1.0, 3.0)
    return (
        Stage(tuple(tasks[:2]), horizons=(10, 20, 40), multipliers=rates, keep=0.3),
        Stage(tuple(tasks[:4]), horizons=(20, 60, 150), multipliers=rates, keep=0.4),
        Stage(tuple(tasks), horizons=(40, 120, 300), seeds=(0, 1), multipliers=rates),
    )


def thorough_stages(tasks: Sequence[str]) -> tuple[Stage, ...]:
    """Three stages of longer runs on more tasks and seeds, in which each task has its own best of five learning rates.

    So a candidate is judged as users judge an optimizer, tuned for their task, and numbers matter less.
    """
    rates = (0.1, 0.3, 1.0, 3.0, 10.0)
    return (
        Stage(tuple(tasks[:3]), horizons=(30, 60, 120), multipliers=rates, own_rates=True, keep=0.3),
        Stage(tuple(tasks[:6]), horizons=(50, 100, 200), seeds=(0, 1), multipliers=rates, own_rates=True, keep=0.4),
        Stage(tuple(tasks), horizons=(60, 150, 400), seeds=(0, 1, 2), multipliers=rates, own_rates=True),
    )


JUDGES = {"usual": usual_stages, "thorough": thorough_stages}
"""Stages by what users call them."""
