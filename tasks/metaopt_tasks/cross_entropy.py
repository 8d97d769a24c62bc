"""What classification tasks share: the scale of their loss and the initialisers of their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from metaopt.task import Task


@dataclass(eq=False)
class CrossEntropyTask(Task):
    """A task whose loss is the mean cross-entropy in nats over ``classes`` classes."""

    classes: int = 10

    def normalize(self, loss: Tensor) -> Tensor:
        """Loss clipped to [0, 1.5 ln C] (NaN: 1.5 ln C), divided by ln C: 1 is guessing, whatever the task."""
        uniform = math.log(self.classes)
        worst = 1.5 * uniform
        return torch.nan_to_num(loss, nan=worst, posinf=worst, neginf=0.0).clamp(0.0, worst) / uniform


def hidden_weight(shape: tuple[int, ...], generator: Generator, gain: float = 1.0) -> Tensor:
    """Float32 normal weights (out, in, *kernel) of standard deviation gain / sqrt(fan_in).

    Gain sqrt(2) is He et al. 2015 (arXiv:1502.01852), for ReLU and its like; gain 1 is LeCun et al. 1998, for linear
    maps and tanh.
    """
    return torch.randn(shape, generator=generator) * (gain / math.sqrt(math.prod(shape[1:])))


def output_weight(shape: tuple[int, int], generator: Generator) -> Tensor:
    """Float32 normal weights (classes, in) of standard deviation 1 / fan_in: the loss starts near ln C.

    As in muP (Yang and Hu 2021, arXiv:2011.14522), so logits start small at any width.
    """
    return torch.randn(shape, generator=generator) / shape[1]
