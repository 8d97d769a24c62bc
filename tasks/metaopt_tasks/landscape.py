"""Functions of a few numbers, without data, whose lowest value is known: what the classic and black-box sets share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor
from torch.func import vmap

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Task
from metaopt_tasks.scales import WORST

SMOOTH, RUGGED = 1e-6, 0.1
"""Resolutions: of functions that fall by orders of magnitude, and of those where local minima end that early."""


@dataclass(eq=False)
class Landscape(Task):
    """The loss is a function whose lowest value is 0, in units of its median over the starts; parameters: ``x`` [dim].

    Coordinates are scaled so that the function's usual domain is a box of half-width 1, whatever it is: one learning
    rate then suits many functions. ``config`` holds what differs between members, ``unit`` (0-d, the median) among it.

    Attributes:
        resolution: the loss below which differences fade in the normalised loss: `SMOOTH` or `RUGGED`.
    """

    resolution: float = SMOOTH

    @abstractmethod
    def value(self, x: Tensor, numbers: Batch) -> Tensor:
        """The function, unscaled, at ``x`` [dim]; ``numbers`` are the config in x's dtype."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The value at ``x`` over ``unit``; numbers come from the batch, or else from the task's own config."""
        x = params["x"]
        numbers = {name: batch.get(name, own).to(x.dtype) for name, own in self.config.items()}
        return self.value(x, numbers) / numbers["unit"]

    def normalize(self, loss: Tensor) -> Tensor:
        """log(1 + loss / r) / log(1 + 1 / r) in [0, 1.5], r the ``resolution``: 0 at the minimum, 1 at a usual start.

        Logarithmic, because much of the work begins where the loss has fallen to a hundredth. NaN counts as 1.5.
        """
        scaled = torch.log1p(loss.clamp_min(0.0) / self.resolution) / math.log1p(1 / self.resolution)
        return torch.nan_to_num(scaled, nan=WORST).clamp(0.0, WORST)

    def info(self) -> dict[str, ParamInfo]:
        """``x`` is a vector that multiplies nothing: a bias."""
        return infer_info(self.init(Generator().manual_seed(0)), {"x": "bias"})

    @abstractmethod
    def optimum(self) -> Params:
        """Parameters at which the loss is 0."""

    def measured(self) -> Self:
        """This task with ``unit`` set: the median, in float64, of the values at 512 starts."""
        numbers = {name: number.double() for name, number in self.config.items()}
        generator = Generator().manual_seed(0)
        starts = torch.stack([self.init(generator)["x"] for _ in range(512)]).double()
        median = vmap(lambda x: self.value(x, numbers))(starts).median()
        # any number of its size will do; with three digits all machines have the same
        self.config["unit"] = torch.tensor(float(f"{float(median):.2e}"))
        return self


def length(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, with gradient 0 at 0, where that of ``sqrt`` would be NaN."""
    return root(x.square().sum(-1))


def root(x: Tensor) -> Tensor:
    """Square root of x >= 0, with gradient 0 at 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
