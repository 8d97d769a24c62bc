"""Losses of a number, entry by entry, of the error e = prediction - target."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from metaopt.objective import INPUTS, Kind, Objective
from metaopt.space import hyper


def scale(default: float, doc: str) -> Any:
    """Declare a scale of errors."""
    return hyper(default, 0.0, 1e6, scale="log", open_low=True, search=(0.01, 100.0), doc=doc)


class ErrorLoss(Objective):
    """A loss that is a function of the error alone: write `of_error`."""

    kind: ClassVar[Kind] = "regression"
    inputs: ClassVar[tuple[str, ...]] = INPUTS["regression"]

    def loss(self, prediction: Any, target: Any, **hp: Any) -> Any:
        """`of_error` of prediction - target."""
        return self.of_error(prediction - target, **hp)

    @abstractmethod
    def of_error(self, error: Any, *args: Any, **hp: Any) -> Any:
        """The loss as a function of the error."""


class SquaredError(ErrorLoss):
    """e^2 (Gauss 1809; Legendre 1805)."""

    def of_error(self, error: Any) -> Any:
        return torch.square(error)


class AbsoluteError(ErrorLoss):
    """|e| (Laplace 1774)."""

    def of_error(self, error: Any) -> Any:
        return torch.abs(error)


class Huber(ErrorLoss):
    """e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2) (Huber 1964, https://doi.org/10.1214/aoms/1177703732)."""

    delta: float = scale(1.0, "where the loss becomes straight")

    def of_error(self, error: Any, delta: Any) -> Any:
        size = torch.abs(error)
        return torch.where(size <= delta, 0.5 * torch.square(error), delta * (size - 0.5 * delta))


class LogCosh(ErrorLoss):
    """log cosh e = |e| - log sigmoid(2 |e|) - log 2 (Green 1990, https://doi.org/10.1109/42.52985)."""

    def of_error(self, error: Any) -> Any:
        size = torch.abs(error)
        return size - F.logsigmoid(2 * size) - math.log(2)


class Quantile(ErrorLoss):
    """max(-level e, (1 - level) e): the pinball loss (Koenker and Bassett 1978, https://doi.org/10.2307/1913643)."""

    level: float = hyper(0.5, 0.0, 1.0, open_low=True, open_high=True, search=(0.05, 0.95), doc="the quantile")

    def of_error(self, error: Any, level: Any) -> Any:
        return torch.maximum(-level * error, (1 - level) * error)


class Cauchy(ErrorLoss):
    """log(1 + (e / width)^2 / 2), whose slope falls for outliers (Black and Anandan 1996, https://doi.org/10.1006/cviu.1996.0006)."""

    width: float = scale(1.0, "errors beyond it count less and less")

    def of_error(self, error: Any, width: Any) -> Any:
        return torch.log(1 + 0.5 * torch.square(error / width))
