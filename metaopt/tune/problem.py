"""The contract of a bilevel problem: hyperparameters of a training run, judged by what the run learnt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Generator, Tensor

from metaopt.rule import Params
from metaopt.tune import Hypers, Inner


class BilevelProblem(ABC):
    r"""Minimise the outer objective of what an inner training run ends with.

    .. math::
        \min_\lambda\; F(\lambda) = f(w_T(\lambda), \lambda), \qquad w_T(\lambda) = \text{the run's last parameters}

    Three splits keep the levels honest: the inner run sees the first, ``outer`` the second, and ``holdout`` a third, by which
    the outer loop keeps the best hyperparameters; what ``report`` measures should lie outside all three.

    Attributes:
        outer_steps, outer_lr: what usually is enough for this problem, with Adam.
    """

    outer_steps: ClassVar[int] = 50
    outer_lr: ClassVar[float] = 0.1

    @abstractmethod
    def hypers(self, generator: Generator) -> Hypers:
        """Where the outer loop starts, determined by the generator."""

    @abstractmethod
    def inner(self, step: int) -> Inner:
        """The training run of outer step ``step``; most problems have the same one always."""

    @abstractmethod
    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """The outer objective, a scalar; stochastic ones draw what belongs to outer step ``step``."""

    def holdout(self, params: Params, hypers: Hypers) -> Tensor | None:
        """The outer objective on examples that neither level sees; None where the problem has no such thing."""
        return None

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """What the problem is judged by: test loss, accuracy, distance from the known optimum, ..."""
        return {}
