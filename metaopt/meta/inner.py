"""What a gradient estimator sees of the inner problem, and the usual one: training runs of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt import tree
from metaopt.learned import LearnedRule, Theta
from metaopt.task import Task
from metaopt.unroll import Carry, start, unroll


class InnerProblem(Protocol):
    """A process in time that depends on theta: M copies, each with its own theta and random stream.

    Estimators know nothing else, so they work for learned optimizers and for two-line toys alike.
    """

    @property
    def horizon(self) -> int:
        """Steps of an episode."""

    def start(self, theta: Theta, seeds: Tensor) -> dict[str, Any]:
        """State at step 0 of M episodes, one per seed [M]; every leaf [M, ...]. ``theta`` has no copy dimension."""

    def run(self, theta: Theta, state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        """``steps`` further steps with ``theta`` [M, ...] per copy; losses [M, steps] and the new state."""


@dataclass(eq=False)
class TrainingRuns:
    """Training ``task`` with ``learned``; losses are the task's normalised ones, so a diverged run counts as the worst.

    Attributes:
        task, learned: the inner problem.
        horizon: length of an episode, in updates.
        backend: of the unroll.
    """

    task: Task
    learned: LearnedRule
    horizon: int
    backend: str = "auto"

    def start(self, theta: Theta, seeds: Tensor) -> dict[str, Any]:
        """Fresh parameters and optimizer states."""
        return start(self.task, self.learned.bind(theta), seeds).tree()

    def run(self, theta: Theta, state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        """An `unroll`."""
        rule = self.learned.bind(theta, stacked=True)
        losses, carry = unroll(
            self.task, rule, Carry.from_tree(state), steps, horizon=self.horizon, backend=self.backend
        )
        return self.task.normalize(losses), carry.tree()


def write_copies(state: Any, at: Tensor, fresh: Any) -> Any:
    """``state`` with the copies ``at`` (int64 indices) replaced by those of ``fresh``; nothing is changed in place."""
    return tree.map_tree(lambda old, new: torch.index_copy(old, 0, at, new.to(old.dtype)), state, fresh)
