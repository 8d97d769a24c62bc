"""The tasks of a meta-training run: which member of its family each is at the moment, and where its inner runs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Generator

from metaopt import registry, tree
from metaopt.evaluate.baseline import Curve, baseline_of
from metaopt.learned import LearnedRule, Theta
from metaopt.meta.config import MetaTrainConfig, TaskChoice
from metaopt.meta.estimator import GradientEstimator
from metaopt.meta.inner import TrainingRuns
from metaopt.meta.shard import Shard
from metaopt.random import hash64
from metaopt.task import Task, TaskFamily


class MetaTask:
    """One of the tasks that theta is trained on, with the carry of its own estimator.

    A family whose members stack gives each episode a member of its own. Of any other family one member is trained at a
    time; after ``resample_every`` windows comes the next, with fresh runs.

    Attributes:
        label: its name in logs.
        family: the name of its family in logs; its own if it has none.
        windows: how many it has had.
        carry: the estimator's; None before the first window.
    """

    def __init__(
        self, choice: TaskChoice, label: str, number: int, config: MetaTrainConfig, learned: LearnedRule, frozen: Theta
    ) -> None:
        self.label, self._choice = label, choice
        self.family = family_of(choice.name)
        self.windows = 0
        self.carry: dict[str, Any] | None = None
        self._config, self._learned, self._frozen = config, learned, frozen
        self._stream = hash64(hash64(torch.tensor(config.seed)) + number)
        self._source = create(choice, config.device)
        self._inner: tuple[int, TrainingRuns] | None = None

    def estimate(self, estimator: GradientEstimator, theta: Theta, shard: Shard) -> tuple[Theta, dict[str, float]]:
        """One window: the meta-gradient (like theta) and the estimator's metrics; collective."""
        inner = self._inner_problem()
        if self.carry is None or self._begins_member:
            self.carry = estimator.start(inner, theta, int(self._seed(self._member)), shard)
        gradient, carry, metrics = estimator.estimate(inner, theta, self.carry, shard)
        # a checkpoint may lose memory layouts, on which the rounding of sums depends
        self.carry = tree.map_tree(torch.Tensor.contiguous, carry)
        self.windows += 1
        return gradient, metrics

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"windows": self.windows, "carry": self.carry}

    def restore(self, state: dict[str, Any], estimator: GradientEstimator, theta: Theta, shard: Shard) -> None:
        """Go on from `state`, whose tensors are on the CPU."""
        self.windows, self.carry = state["windows"], state["carry"]
        if self.carry is not None and not self._begins_member and self._config.device != "cpu":
            # every tensor to where a fresh carry has it: some stay on the CPU
            fresh = estimator.start(self._inner_problem(), theta, 0, shard)
            self.carry = tree.map_tree(lambda value, like: value.to(like.device), self.carry, fresh)

    def baseline(self, objective: str) -> float | None:
        """Normalised test loss of tuned AdamW in an episode of the expected length; None where its curve is not archived.

        Args:
            objective: which of the episode's losses an estimator reports: ``mean``, ``min``, ``last``, or ``recomputed``
                (after the last step).
        """
        task, curve = self._source, self._curve
        if not isinstance(task, Task) or curve is None:
            return None
        length = round(float(self._inner_problem().lengths(torch.arange(256), self.windows).double().mean()))
        losses = torch.tensor([torch.nan if loss is None else loss for loss in curve.losses])
        episode = np.interp(range(length + 1), curve.steps, task.normalize(losses).numpy())
        ends = {"min": episode[:-1].min(), "last": episode[-2], "recomputed": episode[-1]}
        return float(ends.get(objective, episode[:-1].mean()))

    @cached_property
    def _curve(self) -> Curve | None:
        return baseline_of(self._choice.name, self._source) if isinstance(self._source, Task) else None

    @property
    def _is_resampled(self) -> bool:
        return isinstance(self._source, TaskFamily) and not self._source.stacks

    @property
    def _begins_member(self) -> bool:
        return self._is_resampled and self.windows % self._config.resample_every == 0

    @property
    def _member(self) -> int:
        """The number of the family's member that the next window trains."""
        return self.windows // self._config.resample_every if self._is_resampled else 0

    def _seed(self, member: int) -> torch.Tensor:
        return hash64(self._stream + member)

    def _inner_problem(self) -> TrainingRuns:
        if self._inner is None or self._inner[0] != self._member:
            self._inner = (self._member, self._make_inner(self._member))
        return self._inner[1]

    def _make_inner(self, member: int) -> TrainingRuns:
        source, config = self._source, self._config
        task = source if isinstance(source, Task) else source.sample(Generator().manual_seed(int(self._seed(member))))
        length = {"length": config.horizon or task.horizon} if config.truncation == "constant" else {}
        return TrainingRuns(
            task,
            self._learned,
            registry.create("truncation", config.truncation, **length, **config.truncation_options),
            config.backend,
            family=source if isinstance(source, TaskFamily) and source.stacks else None,
            frozen=self._frozen,
            on_divergence=config.on_divergence,
            windows_before=member * config.resample_every,
            judge_split=config.judge_split,
        )


def create(choice: TaskChoice, device: Any) -> Task | TaskFamily:
    """The task or family on ``device``.

    Raises:
        ValueError: an unknown name, or one that gives neither.
    """
    made = registry.create("task", choice.name, device=device, **choice.options)
    if not isinstance(made, Task | TaskFamily):
        raise ValueError(f"{choice.name!r} gives a {type(made).__name__}, no task or family; see metaopt list tasks")
    return made


def labels(choices: Sequence[TaskChoice]) -> list[str]:
    """A name for each, in order: its option ``name`` or its own; where that comes again, with a number."""
    count: Counter[str] = Counter()
    found = []
    for choice in choices:
        name = str(choice.options.get("name", choice.name))
        count[name] += 1
        found.append(name if count[name] == 1 else f"{name}#{count[name]}")
    return found


def family_of(name: str) -> str:
    """The family of a registered task; its own name if it has none."""
    spec = registry.specs("task").get(name)
    return spec.facts.get("family", name) if spec else name
