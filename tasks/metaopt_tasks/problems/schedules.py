"""Learning rates that differ from step to step, learnt by the gradient of what the run ends with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.rule import Params
from metaopt.task import Batch, Task
from metaopt.tune import Hypers, Inner
from metaopt.tune.outer import run
from metaopt.tune.problem import BilevelProblem

_HOLDOUT = 1_000_000  # where the seeds of holdout runs begin, which no outer step has


@dataclass(frozen=True)
class QuadraticSchedule(BilevelProblem):
    r"""The best step sizes of gradient descent on a quadratic, which are known.

    The inner loss is sum_j (lambda_j w_j^2 / 2 - w_j) from w = 0, whose excess after T steps of sizes eta is
    sum_j p(lambda_j)^2 / (2 lambda_j) with p(x) = prod_t (1 - eta_t x). The lambda_j are the Chebyshev nodes of
    [smallest, largest]; for that measure the least p with p(0) = 1 is the Chebyshev polynomial of degree T (orthogonality of
    kernel polynomials: Fischer, "Polynomial Based Iteration Methods", 1996, section 2.4), so the optimum is

    .. math::
        \eta_t^{-1} = \frac{L + \mu}{2} + \frac{L - \mu}{2} \cos\frac{(2 t - 1) \pi}{2 T}, \quad t = 1, \dots, T

    in any order. Hypers: ``log_lr`` [T]. Float64.

    Attributes:
        steps: T; less than ``dimensions``.
        dimensions: number of the lambda_j.
        smallest, largest: mu and L.
    """

    outer_steps: ClassVar[int] = 600
    outer_lr: ClassVar[float] = 0.03
    steps: int = 6
    dimensions: int = 24
    smallest: float = 0.1
    largest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.steps < self.dimensions:
            raise ValueError(f"steps must be in [1, {self.dimensions - 1}], got {self.steps}: below dimensions")

    def hypers(self, generator: Generator) -> Hypers:
        """Random ones: equal step sizes have equal gradients, and would stay equal."""
        spread = torch.rand(self.steps, generator=generator, dtype=torch.float64) - 0.5
        return {"log_lr": spread + math.log(2 / (self.smallest + self.largest))}

    def inner(self, step: int) -> Inner:
        """Gradient descent from zero."""

        def loss(params: Params, hypers: Hypers, batch: None) -> Tensor:
            return self.excess(params) - self._constant

        start = {"w": torch.zeros(self.dimensions, dtype=torch.float64)}
        return Inner.of_rule(loss, "sgd", start, self.steps, hp=lambda hypers, t: {"lr": hypers["log_lr"][t].exp()})

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """The logarithm of the excess, which is 0 at the optimum."""
        return (self.excess(params) / self.best_excess).log()

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """``excess_ratio`` to the optimum, ``lr_error``: the largest relative error of the sorted step sizes, and
        ``constant_ratio``: the ratio that the best of all equal step sizes has."""
        found = hypers["log_lr"].exp().sort().values
        even = torch.linspace(0.5, 2, 301, dtype=torch.float64) * 2 / (self.smallest + self.largest)
        constant = min(float(self._excess_of(lr.expand(self.steps))) for lr in even)
        return {
            "excess_ratio": float(self.excess(params) / self.best_excess),
            "lr_error": float((found / self.chebyshev - 1).abs().max()),
            "constant_ratio": constant / float(self.best_excess),
        }

    @property
    def chebyshev(self) -> Tensor:
        """The best step sizes [T], ascending."""
        return (1 / self._nodes(self.steps)).sort().values

    @cached_property
    def best_excess(self) -> Tensor:
        """Excess loss after the best steps."""
        return self._excess_of(self.chebyshev)

    def excess(self, params: Params) -> Tensor:
        """Inner loss above its minimum."""
        curvatures = self._nodes(self.dimensions)
        return (curvatures * (params["w"] - 1 / curvatures) ** 2).sum() / 2

    @property
    def _constant(self) -> Tensor:
        return (1 / self._nodes(self.dimensions)).sum() / 2

    def _excess_of(self, rates: Tensor) -> Tensor:
        curvatures = self._nodes(self.dimensions)
        return ((1 - rates[:, None] * curvatures).prod(0) ** 2 / curvatures).sum() / 2

    def _nodes(self, count: int) -> Tensor:
        """The Chebyshev nodes of [smallest, largest]."""
        angles = (2 * torch.arange(1, count + 1, dtype=torch.float64) - 1) * math.pi / (2 * count)
        return (self.largest + self.smallest) / 2 + (self.largest - self.smallest) / 2 * angles.cos()


@dataclass(frozen=True)
class TaskSchedule(BilevelProblem):
    """A learning-rate schedule for runs of a registered task.

    Hypers: ``log_lr`` [knots], interpolated over the run. Each outer step is another run (seed of parameters and batches), so
    the schedule cannot learn one run by heart. The outer objective is the loss on the first half of the task's valid part, the
    holdout that on the second half after ``holdout_runs`` other runs, the same at each outer step: a single run's loss tells
    more of its seed than of the schedule. At good learning rates the gradient of a run explodes (chaos): ``method="es"``.

    Attributes:
        task: its name (``metaopt list tasks``).
        rule: what trains it.
        steps: of a run.
        knots: of the schedule.
        initial: learning rate at the first knot, where the last one begins at a tenth of it; or those at all knots.
        judged: examples of each half, and a quarter of those of the test.
        holdout_runs: see above.
        seed: of the first run.
    """

    outer_lr: ClassVar[float] = 0.1
    task: str = "copy_lm"
    rule: str = "adamw"
    steps: int = 100
    knots: int = 8
    initial: float | tuple[float, ...] = 3e-3
    judged: int = 64
    holdout_runs: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.holdout_runs < 1:
            raise ValueError(f"holdout_runs must be at least 1, got {self.holdout_runs}")
        if isinstance(self.initial, tuple) and len(self.initial) != self.knots:
            raise ValueError(
                f"initial has {len(self.initial)} learning rates, but knots is {self.knots}; give one for each"
            )
        if not 2 <= self.knots <= self.steps:
            raise ValueError(f"knots must be in [2, {self.steps}], got {self.knots}: at most one for each step")

    @cached_property
    def workload(self) -> Task:
        """The task itself."""
        task: Task = registry.create("task", self.task)
        return task

    def hypers(self, generator: Generator) -> Hypers:
        """``initial``; a linear decay of the logarithm to a tenth, where it is one number."""
        if isinstance(self.initial, tuple):
            return {"log_lr": torch.tensor(self.initial).log()}
        return {"log_lr": math.log(self.initial) - math.log(10) * torch.linspace(0, 1, self.knots)}

    def inner(self, step: int) -> Inner:
        """Run number ``seed + step`` of the rule on the task."""
        return self.training(self.seed + step)

    def training(self, seed: int) -> Inner:
        """One run under the schedule."""
        inner = Inner.of_task(
            self.workload, self.rule, seed, self.steps, hp=lambda hypers, t: {"lr": self.rate(hypers["log_lr"], t)}
        )
        return dataclasses.replace(inner, loss=None)  # whose optimum would not depend on the schedule

    def rate(self, log_lr: Tensor, t: int) -> Tensor:
        """The learning rate of step t: linear interpolation of logarithms."""
        at = t * (self.knots - 1) / (self.steps - 1)
        low = min(int(at), self.knots - 2)
        return torch.lerp(log_lr[low], log_lr[low + 1], at - low).exp()

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """Loss on the first half of valid."""
        return self.loss(params, "outer")

    def holdout(self, params: Params, hypers: Hypers) -> Tensor | None:
        """Mean loss on the second half of valid."""
        first = self.seed + _HOLDOUT
        return torch.stack([self._judged(hypers, first + i, "holdout") for i in range(self.holdout_runs)]).mean()

    def loss(self, params: Params, part: str) -> Tensor:
        """Of the task, on ``outer``, ``holdout`` or ``test``."""
        return self.workload.loss(params, self._parts[part] | self.workload.config)

    def test_loss(self, hypers: Hypers, seed: int) -> float:
        """Of a fresh run under the schedule, on the task's test part."""
        return float(self._judged(hypers, seed, "test"))

    def _judged(self, hypers: Hypers, seed: int, part: str) -> Tensor:
        inner = self.training(seed)
        with torch.no_grad():
            return self.loss(inner.params(run(inner, hypers)), part)

    @cached_property
    def _parts(self) -> dict[str, Batch]:
        task = self.workload
        half = min(self.judged, len(task.valid) // 2)
        # windows of a text overlap with their neighbours: take them from all over
        valid = torch.linspace(0, len(task.valid) - 1, 2 * half).long()
        test = torch.linspace(0, len(task.test) - 1, min(4 * self.judged, len(task.test))).long()
        rows = {"outer": (task.valid, valid[:half]), "holdout": (task.valid, valid[half:]), "test": (task.test, test)}
        return {name: split.take(at.to(task.device)) for name, (split, at) in rows.items()}
