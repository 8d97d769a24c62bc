"""Initial parameters from which one gradient step learns a curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.func import vmap

from metaopt.resolve import resolve_rule
from metaopt.rule import Params
from metaopt.tune import Hypers, Inner
from metaopt.tune.outer import run
from metaopt.tune.problem import BilevelProblem
from metaopt_tasks.layers import mlp, mlp_params

_STREAMS = {"train": 0, "holdout": 1, "test": 2}


@dataclass(frozen=True)
class MamlSine(BilevelProblem):
    """Model-agnostic meta-learning of sines (Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.1).

    The inner run adapts a perceptron with ReLU to ``shots`` points of a sine of random amplitude in [0.1, 5] and phase in
    [0, pi] at inputs in [-5, 5]; the outer objective is the mean squared error at as many other points of the same sine. The
    hypers are the initial parameters. An outer step has ``episodes`` fresh sines, adapted side by side.

    Attributes:
        shots: points to adapt to, and to judge by.
        episodes: of an outer step.
        hidden: widths of the network.
        inner_steps, inner_lr: of gradient descent.
        seed: of everything.
    """

    outer_steps: ClassVar[int] = 20_000
    outer_lr: ClassVar[float] = 1e-3
    shots: int = 5
    episodes: int = 25
    hidden: tuple[int, ...] = (40, 40)
    inner_steps: int = 1
    inner_lr: float = 0.01
    seed: int = 0

    def hypers(self, generator: Generator) -> Hypers:
        """He's normal weights."""
        return mlp_params((1, *self.hidden, 1), generator, math.sqrt(2))

    def inner(self, step: int) -> Inner:
        """All episodes of an outer step at once: parameters [episodes, ...]."""
        return self.adaptation(self.points("train", step, self.episodes)[0], self.inner_steps)

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """Mean over the episodes after adaptation."""
        return self.errors(params, self.points("train", step, self.episodes)[1]).mean()

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """Mean squared error over 600 other sines after 0, 1 and 10 steps: ``error_0``, ``error_1``, ``error_10``.

        Sines on which so many steps diverge do not count in the mean: ``diverged_10`` and so on are their numbers.
        """
        found: dict[str, float] = {}
        for steps in (0, 1, 10):
            errors = self.test_errors(hypers, steps)
            finite = errors.isfinite()
            found |= {f"error_{steps}": float(errors[finite].mean()), f"diverged_{steps}": float((~finite).sum())}
        return found

    def test_errors(self, hypers: Hypers, steps: int, episodes: int = 600) -> Tensor:
        """Mean squared error [episodes] on sines that no outer step sees, after so many steps; judged at 100 points each."""
        support, query = self.points("test", 0, episodes, queries=100)
        inner = self.adaptation(support, steps)
        with torch.no_grad():
            return self.errors(inner.params(run(inner, hypers)), query)

    def adaptation(self, support: tuple[Tensor, Tensor], steps: int) -> Inner:
        """Gradient descent on each episode by itself, from the hypers."""

        def start(hypers: Hypers) -> Params:
            return {name: p.expand(len(support[0]), *p.shape) for name, p in hypers.items()}

        def loss(params: Params, hypers: Hypers, batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.errors(params, batch).sum()

        return Inner.of_rule(loss, resolve_rule("sgd", lr=self.inner_lr), start, steps, full_batch=support)

    def errors(self, params: Params, points: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error [episodes] of parameters [episodes, ...] at x, y [episodes, points, 1]."""
        x, y = points
        return ((vmap(lambda p, x: mlp(p, x, torch.relu))(params, x) - y) ** 2).mean((1, 2))

    def points(
        self, part: str, step: int, episodes: int, queries: int | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Support and query points of some sines, each (x, y) [episodes, points, 1]; a function of the arguments."""
        generator = Generator().manual_seed((self.seed * len(_STREAMS) + _STREAMS[part]) * 10_000_000 + step)
        amplitude = 0.1 + 4.9 * torch.rand(episodes, 1, 1, generator=generator)
        phase = math.pi * torch.rand(episodes, 1, 1, generator=generator)
        x = 10 * torch.rand(episodes, self.shots + (queries or self.shots), 1, generator=generator) - 5
        y = amplitude * torch.sin(x - phase)
        return (x[:, : self.shots], y[:, : self.shots]), (x[:, self.shots :], y[:, self.shots :])
