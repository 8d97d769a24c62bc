"""How losses become comparable: 0 is the best there is, 1 is knowing nothing, 1.5 is the worst that counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.task import Task

WORST = 1.5


@dataclass(eq=False)
class ScaledTask(Task):
    """A task whose loss is ``floor`` at best, and about ``floor + scale`` for a model that knows nothing.

    Attributes:
        floor: the lowest loss, or a lower bound of it.
        scale: what the normalised loss is measured in; above 0.
    """

    floor: float = 0.0
    scale: float = 1.0

    def normalize(self, loss: Tensor) -> Tensor:
        """(loss - floor) / scale in [-1.5, 1.5]; NaN counts as 1.5."""
        return torch.nan_to_num((loss - self.floor) / self.scale, nan=WORST).clamp(-WORST, WORST)


@dataclass(eq=False)
class CrossEntropyTask(Task):
    """A task whose loss is the mean cross-entropy in nats over ``classes`` classes."""

    classes: int = 10

    def normalize(self, loss: Tensor) -> Tensor:
        """Loss clipped to [0, 1.5 ln C] (NaN: 1.5 ln C), divided by ln C: 1 is guessing, whatever the task."""
        uniform = math.log(self.classes)
        worst = WORST * uniform
        return torch.nan_to_num(loss, nan=worst, posinf=worst, neginf=0.0).clamp(0.0, worst) / uniform
