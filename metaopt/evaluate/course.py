"""What contenders run on: a task, or a family with one member per seed; K seeds start, train and score at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from metaopt import tree
from metaopt.evaluate.losses import split_losses
from metaopt.rule import UpdateRule
from metaopt.task import Split, Task, TaskFamily, stack_configs
from metaopt.unroll import Carry, start, unroll


@dataclass
class Course:
    """One task of a race, on the race's device, with the number of steps that every run has.

    Attributes:
        name: the task's or the family's.
        task: the task itself, or the member of the family that lends its loss and data.
        family: whose members the seeds draw; None for a plain task.
    """

    name: str
    task: Task
    family: TaskFamily | None
    backend: str
    _model: Task
    _members: dict[int, Task] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Task | TaskFamily, steps: int | None, device: Any, backend: str) -> Course:
        """Prepare ``source``; ``steps`` None means its own horizon.

        Raises:
            TypeError: ``source`` is neither a task nor a family.
        """
        if isinstance(source, Task):
            return cls(source.name, placed(source, device, steps or source.horizon), None, backend, source)
        if not isinstance(source, TaskFamily):
            raise TypeError(f"a race runs on tasks, families or their names, got {source!r}; see metaopt.task")
        model = source.sample(Generator().manual_seed(0))
        return cls(source.name, placed(model, device, steps or model.horizon), source, backend, model)

    @property
    def steps(self) -> int:
        """Length of every training run."""
        return self.task.horizon

    @property
    def device(self) -> torch.device:
        """Where the runs live."""
        return self.task.device

    def start(self, rule: UpdateRule, seeds: Sequence[int]) -> Carry:
        """Fresh runs, one per seed; for a family each on the member that its seed draws."""
        config = None
        if self.family is not None:
            config = tree.map_tree(
                lambda value: value.to(self.device), stack_configs([self._member(seed) for seed in seeds])
            )
        return start(self.task, rule, torch.tensor(seeds), config=config)

    def train(
        self, rule: UpdateRule, carry: Carry, steps: int, hp: Mapping[str, float | Tensor] | None
    ) -> tuple[Tensor, Carry]:
        """Advance; losses [K, steps], NaN from where a run diverged."""
        with torch.no_grad():
            losses, carry = unroll(self.task, rule, carry, steps, hp=hp, backend=self.backend)
        return losses, carry

    def losses(self, carry: Carry, split: Split, max_examples: int | None) -> Tensor:
        """Loss of every run on ``split``, float64 [K] on the CPU; NaN where diverged or infinite, whatever a run froze at."""
        losses = split_losses(
            self.task, carry.params, split, carry.config | carry.buffers, max_examples=max_examples,
            vmapped=self.backend != "loop",
        )  # fmt: skip
        return torch.where(carry.alive & torch.isfinite(losses), losses, torch.nan).cpu()

    def scores(self, losses: Tensor, seeds: Sequence[int]) -> Tensor:
        """Normalised losses [K]: what can be averaged over tasks; a family's members each normalise their own."""
        if self.family is None:
            return self.task.normalize(losses)
        return torch.stack([self._member(seed).normalize(loss) for seed, loss in zip(seeds, losses, strict=True)])

    def _member(self, seed: int) -> Task:
        if seed not in self._members:
            assert self.family is not None
            member = self.family.sample(Generator().manual_seed(seed))
            for name in ("train", "valid", "test"):
                _require_same_data(self.name, name, getattr(member, name), getattr(self._model, name))
            self._members[seed] = member
        return self._members[seed]


def placed(task: Task, device: Any, horizon: int) -> Task:
    """The same task with its data on ``device`` and ``horizon`` steps; the caller's object stays as it is."""
    new = task.to(device)
    new.horizon = horizon
    return new


def _require_same_data(family: str, name: str, ours: Split, theirs: Split) -> None:
    same = ours.tensors.keys() == theirs.tensors.keys() and all(
        mine is theirs.tensors[key] or torch.equal(mine, theirs.tensors[key]) for key, mine in ours.tensors.items()
    )
    if not same:
        raise ValueError(
            f"members of family {family!r} have different {name} data, so they do not run as one batch; "
            f"race named members (metaopt list tasks) or members that you sampled"
        )


def seed_streams(seed: int, task: str, tune: int, final: int) -> tuple[list[int], list[int]]:
    """Seeds of the tuning runs and of the final runs: functions of the race's seed and the task's name only.

    They are disjoint, do not depend on the other tasks or on the contenders, and more of them extend fewer of them.
    """
    streams = []
    for phase, count in enumerate((tune, final)):
        words = np.random.SeedSequence([seed, *task.encode(), phase]).generate_state(count, np.uint64)
        streams.append([int(word >> np.uint64(2)) * 2 + phase for word in words])
    return streams[0], streams[1]
