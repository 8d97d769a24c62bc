"""Things that tests of the trainer name as ``trainer_tasks.py:NAME``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.random import uniform
from metaopt.rule import Params
from metaopt.task import Batch, Split, Task
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import SAM


class Exploding(Task):
    """0.5 |x|^2; at each step with probability ``rate`` not a number."""

    stochastic = True
    rate = 0.0

    def init(self, generator: Generator) -> Params:
        return {"x": torch.randn(3, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        loss = 0.5 * params["x"].square().sum()
        return torch.where(uniform(batch["random"], ()) < self.rate, torch.nan, loss)

    def normalize(self, loss: Tensor) -> Tensor:
        return torch.nan_to_num(loss / 3, nan=1.5).clamp(max=1.5)


def exploding(rate: float = 0.05, device: Any = "cpu") -> Exploding:
    task = Exploding("exploding", Split(), Split(), Split(), batch_size=1, horizon=10)
    task.rate = rate
    return task


class Unjudged(Exploding):
    """A task of an author who forgot what a loss that is not finite is worth."""

    def normalize(self, loss: Tensor) -> Tensor:
        return loss * torch.nan


def unjudged(device: Any = "cpu") -> Unjudged:
    return Unjudged("unjudged", Split(), Split(), Split(), batch_size=1, horizon=3)


def sharpness_aware(lr: float = 0.1) -> SAM:
    return SAM(SGD(lr=lr))
