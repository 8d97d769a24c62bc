"""A task that holds a task: the base of all augmentations."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Generator, Tensor

from metaopt.random import hash64
from metaopt.rule import ParamInfo, Params
from metaopt.task import Batch, Split, Task

_KEYS = 1 << 41  # separates the keys of wrappers from those that a task draws from itself


@dataclass(eq=False)
class Wrapper(Task):
    """A task that is another task in everything that a subclass does not change.

    Attributes:
        task: the one inside; everything that `Task` declares is taken from there.
    """

    name: str = field(init=False)
    train: Split = field(init=False)
    valid: Split = field(init=False)
    test: Split = field(init=False)
    batch_size: int = field(init=False)
    horizon: int = field(init=False)
    config: Batch = field(init=False)

    task: Task

    draws: ClassVar[bool] = False
    """Whether the wrapper itself draws random numbers."""

    def __post_init__(self) -> None:
        self.name = f"{self.task.name}+{self.label}"
        self.batch_size, self.horizon = self.task.batch_size, self.task.horizon
        self._depth: int = getattr(self.task, "_depth", 0) + 1
        self._take_data()

    def _take_data(self) -> None:
        inside = self.task
        self.train, self.valid, self.test, self.config = inside.train, inside.valid, inside.test, inside.config

    @property
    def label(self) -> str:
        """What the name of the task gets appended."""
        return type(self).__name__.lower()

    @property
    def stochastic(self) -> bool:  # type: ignore[override]  # a fact of the task inside, where others know it by class
        """Whether losses draw random numbers: the wrapper's or the task's inside."""
        return self.draws or self.task.stochastic

    def init(self, generator: Generator) -> Params:
        """As the task inside."""
        return self.task.init(generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """As the task inside."""
        return self.task.loss(params, batch)

    def buffers(self) -> Params:
        """As the task inside."""
        return self.task.buffers()

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """As the task inside."""
        return self.task.training_loss(params, buffers, batch)

    def normalize(self, loss: Tensor) -> Tensor:
        """As the task inside."""
        return self.task.normalize(loss)

    def info(self) -> dict[str, ParamInfo]:
        """As the task inside."""
        return self.task.info()

    def to(self, device: Any) -> Self:
        """The same wrapper around the task inside on ``device``."""
        new = copy.copy(self)
        new.task = self.task.to(device)
        new._take_data()
        return new

    def _key(self, batch: Batch) -> Tensor:
        """A key of this wrapper's own, whatever it wraps and whatever wraps it."""
        return hash64(batch["random"] + (_KEYS + self._depth))
