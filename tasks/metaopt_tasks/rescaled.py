"""A task in units that differ from run to run: the augmentation that Celo was meta-trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.rule import Params
from metaopt.task import Batch, Task, TaskFamily
from metaopt_tasks.wrapper import Wrapper

_SCALE = "rescaled.scale"


@dataclass(eq=False)
class Rescaled(Wrapper):
    """As `metaopt_tasks.augment.Reparametrized` with one scale for all parameters, which lies in ``config``.

    Attributes:
        scale: parameters are divided by it at the start, and multiplied by it in every loss; above 0.
    """

    scale: float = 1.0

    def _take_data(self) -> None:
        super()._take_data()
        self.config = self.task.config | {_SCALE: torch.tensor(self.scale, device=self.task.device)}

    @property
    def label(self) -> str:
        """``scale`` and the number."""
        return f"rescaled{self.scale:g}"

    def init(self, generator: Generator) -> Params:
        """The task's own, divided by the scale."""
        return {name: p / self.config[_SCALE].cpu() for name, p in self.task.init(generator).items()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The task's, at parameters times the scale."""
        return self.task.loss(self._scaled(params, batch), batch)

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, at parameters times the scale."""
        return self.task.training_loss(self._scaled(params, batch), buffers, batch)

    def _scaled(self, params: Params, batch: Batch) -> Params:
        scale = batch.get(_SCALE, self.config[_SCALE])
        return {name: p * scale.to(p.dtype) for name, p in params.items()}


@dataclass(frozen=True)
class RescaledFamily(TaskFamily):
    """One task, each run of which has a log-uniform scale of its own.

    Attributes:
        task: a registered task, with ``options``.
        low, high: scales are between these; 0.001 to 1000 as in Celo (Moudgil et al., 2025).
        device: where the data live.
    """

    stacks: ClassVar[bool] = True

    task: str = "digits_mlp"
    low: float = 1e-3
    high: float = 1e3
    options: Mapping[str, Any] = field(default_factory=dict)
    device: Any = "cpu"
    name: str = "rescaled"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low and high must be 0 < low <= high, got {self.low} and {self.high}")
        if not isinstance(self._inside, Task):
            raise ValueError(f"task must name one task, got {self.task!r}, a family; name one of its members")

    def sample(self, generator: Generator) -> Task:
        """The task with one scale."""
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        return Rescaled(self._inside, self.low * (self.high / self.low) ** share)

    @cached_property
    def _inside(self) -> Any:
        return registry.create("task", self.task, device=self.device, **self.options)
