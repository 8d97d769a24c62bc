"""What a gradient estimator sees of the inner problem, and the usual one: training runs of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from metaopt import tree
from metaopt.learned import BoundRule, LearnedRule, Theta
from metaopt.meta.truncation import Constant, TruncationSchedule
from metaopt.random import hash64, sample_indices, step_keys
from metaopt.rule import Params
from metaopt.task import Batch, Task, TaskFamily, stack_configs
from metaopt.unroll import Carry, start, unroll

_JUDGE_STREAM = 1 << 41  # separates the batches of `judge` from those of training
_MEMBER_STREAM = 1 << 43  # separates the members of a family from the initial parameters


class InnerProblem(Protocol):
    """A process in time that depends on theta: M copies, each with its own theta and random stream.

    Estimators know nothing else, so they work for learned optimizers and for two-line toys alike.

    Attributes:
        worst: what a loss that is not finite counts as; None: its copy is left out.
    """

    @property
    def worst(self) -> float | None:
        """See the class."""

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        """Steps of the episodes that begin with these seeds, int64 [M] at least 1: a pure function of seed and window."""

    def start(self, theta: Theta, seeds: Tensor, lengths: Tensor) -> dict[str, Any]:
        """State at step 0 of M episodes of these lengths, with ``theta`` [M, ...] per copy; every leaf [M, ...].

        A state that depends on theta (a learned initial state) is a part of what is perturbed and differentiated.
        """

    def run(self, theta: Theta, state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        """``steps`` further steps with ``theta`` [M, ...] per copy; losses [M, steps] and the new state.

        A loss that is not finite says that the copy diverged. Differentiable in theta and state where grad is enabled.
        """

    def judge(self, theta: Theta, state: dict[str, Any]) -> Tensor:
        """A low-noise loss [M] of where the copies are now (fresh batches); only some estimators need it."""


@dataclass(eq=False)
class TrainingRuns:
    """Training ``task`` with ``learned``; losses are the task's normalised ones, NaN once a run has diverged.

    Attributes:
        task, learned: the inner problem.
        schedule: lengths of episodes, in updates.
        backend: of the unroll.
        family: where its members stack (``task`` is one of them), each run trains the member that its seed draws.
        frozen: the part of the meta-parameters that ``theta`` lacks, without copy dimension.
        on_divergence: ``exclude``, or ``worst``: a diverged run's losses count as the worst normalised one.
        windows_before: added to the number of the window, where this problem goes on with another's schedule.
        judge_split: whose examples `judge` takes: ``train`` or ``valid``.
        judge_batches: batches that `judge` averages over.
    """

    task: Task
    learned: LearnedRule
    schedule: TruncationSchedule = field(default_factory=Constant)
    backend: str = "auto"
    family: TaskFamily | None = None
    frozen: Theta = field(default_factory=dict)
    on_divergence: str = "exclude"
    windows_before: int = 0
    judge_split: str = "train"
    judge_batches: int = 16

    @property
    def worst(self) -> float | None:
        """The worst normalised loss, if that is what a diverged run counts as."""
        return None if self.on_divergence == "exclude" else float(self.task.normalize(torch.tensor(torch.nan)))

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        """As the schedule says."""
        return self.schedule.lengths(seeds, self.windows_before + window)

    def start(self, theta: Theta, seeds: Tensor, lengths: Tensor) -> dict[str, Any]:
        """Fresh parameters and optimizer states."""
        config = None
        if self.family is not None:
            members = [
                self.family.sample(Generator().manual_seed(int(seed))) for seed in hash64(seeds + _MEMBER_STREAM)
            ]
            config = tree.map_tree(lambda value: value.to(self.task.device), stack_configs(members))
        carry = start(self.task, self._rule(theta), seeds, config=config)
        return {"run": carry.tree(), "length": lengths.to(self.task.device)}

    def run(self, theta: Theta, state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        """An `unroll`."""
        runs = Carry.from_tree(state["run"])
        losses, carry = unroll(self.task, self._rule(theta), runs, steps, horizon=state["length"], backend=self.backend)
        return self._scored(losses), {"run": carry.tree(), "length": state["length"]}

    def judge(self, theta: Theta, state: dict[str, Any]) -> Tensor:
        """Mean normalised loss over batches that the runs have not drawn; copies of one seed get the same ones."""
        carry, size = Carry.from_tree(state["run"]), self.task.batch_size
        split = getattr(self.task, self.judge_split)
        seeds = hash64(carry.seeds + _JUDGE_STREAM)
        loss = self._one_by_one if self.backend == "loop" else torch.vmap(self.task.loss)
        total = torch.zeros(len(seeds), device=seeds.device)
        for number in range(self.judge_batches):
            at = torch.full_like(seeds, number)
            batch = split.take(sample_indices(seeds, at, size, len(split))) | carry.config
            if self.task.stochastic:
                batch["random"] = step_keys(seeds, at)
            losses = loss(carry.params, batch | carry.buffers)
            total = total + self._scored(torch.where(carry.alive, losses, torch.nan))
        return total / self.judge_batches

    def _one_by_one(self, params: Params, batch: Batch) -> Tensor:
        """Losses of tasks that vmap cannot take."""
        copies = range(len(next(iter(params.values()))))
        return torch.stack([self.task.loss(tree.index(params, k), tree.index(batch, k)) for k in copies])

    def _rule(self, theta: Theta) -> BoundRule:
        copies = len(next(iter(theta.values())))
        frozen = {name: value.expand(copies, *value.shape) for name, value in self.frozen.items()}
        return self.learned.bind(theta | frozen, stacked=True)

    def _scored(self, losses: Tensor) -> Tensor:
        finite = torch.isfinite(losses)
        scores = self.task.normalize(torch.where(finite, losses, 1.0))  # so that no NaN enters its derivative
        return torch.where(finite, scores, torch.nan)


def write_copies(state: Any, at: Tensor, fresh: Any) -> Any:
    """``state`` with the copies ``at`` (int64 indices) replaced by those of ``fresh``; nothing is changed in place."""
    return tree.map_tree(lambda old, new: torch.index_copy(old, 0, at, new.to(old.dtype)), state, fresh)
