"""Few made-up examples in place of many real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.resolve import resolve_rule
from metaopt.rule import Params
from metaopt.task import Batch
from metaopt.tune import Hypers, Inner
from metaopt.tune.outer import run
from metaopt.tune.problem import BilevelProblem
from metaopt_tasks.layers import mlp
from metaopt_tasks.problems.classification import Classification

_FREQUENCIES = 4


@dataclass(frozen=True)
class DataDistillation(Classification):
    """One image of each class that teaches a softmax regression what all real ones do (Wang et al. 2018, arXiv:1811.10959).

    Hypers: ``images`` [classes, features], which begin as noise, and ``log_lr`` (), of the inner run. ``report``:
    ``test_accuracy``; and of runs of the same kind, ``real_images`` on one real image of each class, ``class_means`` on their
    means, and ``all_images`` on every real image.
    """

    outer_steps: ClassVar[int] = 200
    outer_lr: ClassVar[float] = 0.05
    examples: int = 10
    outer_examples: int = 800
    inner_steps: int = 20
    inner_lr: float = 0.1

    def hypers(self, generator: Generator) -> Hypers:
        """Noise of the deviation of the data."""
        images = torch.randn(self.classes, self.features, generator=generator)
        return {"images": images.to(self.device), "log_lr": torch.tensor(math.log(self.inner_lr), device=self.device)}

    def inner(self, step: int) -> Inner:
        """Full-batch gradient descent from zero weights on the learned images."""
        return self._training(lambda hypers: hypers["images"], torch.arange(self.classes, device=self.device))

    def logits(self, params: Params, hypers: Hypers, inputs: Tensor) -> Tensor:
        """Of a softmax regression."""
        return mlp(params, inputs, torch.relu)

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """See the class."""
        real = self.parts["outer"]
        members = [real["input"][real["label"] == c] for c in range(self.classes)]
        controls: dict[str, Batch] = {
            "real_images": {"input": torch.stack([rows[0] for rows in members])},
            "class_means": {"input": torch.stack([rows.mean(0) for rows in members])},
            "all_images": real,
        }
        found = super().report(params, hypers)
        for name, data in controls.items():
            label = data.get("label", torch.arange(self.classes, device=self.device))
            found[name] = max(self._control(data["input"], label, lr) for lr in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
        return found

    def _control(self, inputs: Tensor, label: Tensor, lr: float) -> float:
        inner = self._training(lambda hypers: inputs, label)
        hypers = {"log_lr": torch.tensor(math.log(lr), device=self.device)}
        return self.accuracy(inner.params(run(inner, hypers)), hypers)

    def _training(self, images: Callable[[Hypers], Tensor], label: Tensor) -> Inner:
        def loss(params: Params, hypers: Hypers, batch: None) -> Tensor:
            return F.cross_entropy(self.logits(params, hypers, images(hypers)), label)

        return Inner.of_rule(
            loss, resolve_rule("sgd"), self.network(()), self.inner_steps,
            hp=lambda hypers, t: {"lr": hypers["log_lr"].exp()},
        )  # fmt: skip


@dataclass(frozen=True)
class OnePoint(BilevelProblem):
    """One learned example for an overparameterised regression: where warm and cold starts differ (Vicol et al. 2022,
    arXiv:2212.14032, section 4).

    The inner problem fits a single point (x, y) by linear regression on 9 Fourier features: very many weights do. The outer
    objective is the mean squared error on 9 points of a curve, 5 of them at each outer step. Whatever its steps, a cold start
    ends with a multiple of the features of x, of which none describes the curve: ``cold_bound``. With a warm start the point
    wanders, the weights keep what each place taught them, and come to fit the whole curve; a fresh run on the final point
    knows nothing of it.

    Hypers: ``x`` and ``y`` (). Float64. ``report``: ``error`` on the curve of the parameters that the loop had,
    ``fresh_error`` of the best that a fresh run can do with the final x, and ``cold_bound``, with any x.

    Attributes:
        inner_steps: of gradient descent.
        share: of the error at the point that one step removes.
    """

    outer_steps: ClassVar[int] = 4000
    outer_lr: ClassVar[float] = 0.05
    inner_steps: int = 1
    share: float = 0.1

    def hypers(self, generator: Generator) -> Hypers:
        """A random point."""
        x, y = torch.rand(2, generator=generator, dtype=torch.float64)
        return {"x": 2 * math.pi * x, "y": y}

    def inner(self, step: int) -> Inner:
        """Gradient descent from zero on half the squared error at the point."""

        def loss(params: Params, hypers: Hypers, batch: None) -> Tensor:
            return (self.features(hypers["x"]) @ params["w"] - hypers["y"]) ** 2 / 2

        start = {"w": torch.zeros(2 * _FREQUENCIES + 1, dtype=torch.float64)}
        # cos^2 + sin^2 = 1 for each frequency: the features of every point have this squared norm
        rule = resolve_rule("sgd", lr=self.share / (_FREQUENCIES + 1))
        return Inner.of_rule(loss, rule, start, self.inner_steps)

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """Mean squared error on five points of the curve."""
        x, y = self._curve
        rows = torch.randperm(len(x), generator=Generator().manual_seed(step))[:5]
        return ((self.features(x[rows]) @ params["w"] - y[rows]) ** 2).mean()

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """See the class."""
        x = torch.linspace(0, 2 * math.pi, 1001, dtype=torch.float64)
        return {
            "error": float(((self.features(self._curve[0]) @ params["w"] - self._curve[1]) ** 2).mean()),
            "fresh_error": float(self._best_multiple(hypers["x"][None])),
            "cold_bound": float(self._best_multiple(x).min()),
        }

    def features(self, x: Tensor) -> Tensor:
        """[..., 9]: 1, and cosine and sine of x, 2x, 3x and 4x."""
        angles = x[..., None] * torch.arange(1, _FREQUENCIES + 1, dtype=torch.float64)
        return torch.cat([torch.ones_like(x[..., None]), angles.cos(), angles.sin()], -1)

    def _best_multiple(self, x: Tensor) -> Tensor:
        """The least error on the curve of a multiple of the features of each x [n]."""
        at, y = self._curve
        answers = self.features(x) @ self.features(at).T
        factors = (answers @ y) / (answers**2).sum(1)
        return ((factors[:, None] * answers - y) ** 2).mean(1)

    @cached_property
    def _curve(self) -> tuple[Tensor, Tensor]:
        x = torch.arange(9, dtype=torch.float64) * (2 * math.pi / 9)
        return x, torch.sin(x) + 0.5 * torch.cos(2 * x)
