"""How good theta is: fresh training runs on tasks that it is not trained on, against tuned AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.evaluate.baseline import EXAMPLES, Curve, baseline_of
from metaopt.evaluate.course import Course, seed_streams
from metaopt.meta.config import TaskChoice
from metaopt.meta.shard import Shard
from metaopt.meta.tasks import create, family_of, labels
from metaopt.rule import UpdateRule
from metaopt.task import Task


@dataclass
class _Item:
    label: str
    family: str
    course: Course
    curve: Curve | None
    seeds: list[int]

    def score(self, rule: UpdateRule) -> float:
        """Mean over the runs; see `Evaluation`. NaN counts as -1, the worst."""
        carry = self.course.start(rule, self.seeds)
        _, carry = self.course.train(rule, carry, self.course.steps, None)
        losses = self.course.losses(carry, self.course.task.valid, EXAMPLES)
        if self.curve is not None:
            return sum(self.curve.score(loss) for loss in losses.tolist()) / len(losses)
        score = float(1 - self.course.scores(losses, self.seeds).double().mean())
        return -1.0 if math.isnan(score) else score


class Evaluation:
    """Scores of a rule on tasks: runs of each task's own horizon, judged on its valid split.

    A score is 0 for untrained and 1 for tuned AdamW at the horizon where its curve is archived (`Curve.score`, in [-1, 2]);
    elsewhere it is 1 minus the normalised loss: 0 for knowing nothing, 1 for perfect. (Curves are of the test split, which
    is kept for judging, so a score of 1 is tuned AdamW's but for the difference between two samples of the same data.)

    Args:
        choices: the tasks, or families whose members stack.
        runs: training runs per task, always of the same seeds.
        seed: which determines them.
        device, backend: where and how they go.

    Raises:
        ValueError: a family whose members do not stack.
    """

    def __init__(self, choices: Sequence[TaskChoice], runs: int, seed: int, device: Any, backend: str) -> None:
        self._items = []
        for choice, label in zip(choices, labels(choices), strict=True):
            source = create(choice, device)
            if not isinstance(source, Task) and not source.stacks:
                raise ValueError(
                    f"members of {choice.name!r} do not stack, so no two evaluations would be of the same; "
                    f"evaluate on named members (metaopt list tasks)"
                )
            curve = baseline_of(choice.name, source) if isinstance(source, Task) else None
            # other seeds than those of a race, which may judge on the same tasks
            _, seeds = seed_streams(seed, f"evaluation of {label}", 0, runs)
            self._items.append(
                _Item(label, family_of(choice.name), Course.of(source, None, device, backend), curve, seeds)
            )

    @property
    def families(self) -> dict[str, str]:
        """Of each label."""
        return {item.label: item.family for item in self._items}

    def scores(self, rule: UpdateRule, shard: Shard) -> dict[str, float]:
        """Score by label. The tasks are divided among the processes; collective."""
        own = torch.zeros(len(self._items), dtype=torch.float64)
        for i in range(shard.rank, len(self._items), shard.world):
            own[i] = self._items[i].score(rule)
        return {item.label: score for item, score in zip(self._items, shard.sum(own).tolist(), strict=True)}
