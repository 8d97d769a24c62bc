"""Augmentations: any task seen through a wrapper that changes how it trains, never what it is judged by.

They compose, and names tell: ``digits_mlp+reparam_tensor+delay2``. Most are those that VeLO was meta-trained with (Metz et
al. 2022, arXiv:2211.09760, appendix on task augmentation).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from metaopt import registry, tree
from metaopt.random import uniform
from metaopt.rule import Params
from metaopt.task import Batch, Task
from metaopt_tasks.augment_gradients import DelayedGradients, GradientNoise, LossScale, NormalizedGradients
from metaopt_tasks.choices import require_choice
from metaopt_tasks.wrapper import Wrapper

LEVELS = ("global", "tensor", "parameter")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(eq=False)
class Reparametrized(Wrapper):
    """The task in other units: parameters are divided by ``scale`` at the start, and multiplied by it in every loss.

    The function at the start is the same; by the chain rule, gradients are ``scale`` times those of the task, so
    updates that do not adapt, such as those of SGD, move the task's own parameters by scale^2 of what they did.

    Attributes:
        level: one scale for all (``global``), one for each tensor (``tensor``) or for each number (``parameter``).
        low, high: scales are log-uniform between these; above 0.
        seed: which determines them.
    """

    level: str = "tensor"
    low: float = 0.01
    high: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("level", self.level, LEVELS)
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low and high must be 0 < low <= high, got {self.low} and {self.high}")
        super().__post_init__()
        generator = Generator().manual_seed(self.seed)
        span = math.log(self.high / self.low)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            share = torch.rand(shape, generator=generator, dtype=torch.float64)
            return (self.low * torch.exp(span * share)).float().to(self.device)

        shared = drawn(())
        shapes = {name: info.shape for name, info in self.task.info().items()}
        self.scales: Params = {
            name: shared if self.level == "global" else drawn(shape if self.level == "parameter" else ())
            for name, shape in shapes.items()
        }

    @property
    def label(self) -> str:
        """``reparam_`` and the level."""
        return f"reparam_{self.level}"

    def init(self, generator: Generator) -> Params:
        """The task's own, divided by their scales."""
        return {name: p / self.scales[name].cpu() for name, p in self.task.init(generator).items()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The task's, at parameters times scales."""
        return self.task.loss(self.scaled(params), batch)

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, at parameters times scales."""
        return self.task.training_loss(self.scaled(params), buffers, batch)

    def scaled(self, params: Params) -> Params:
        """The task's own parameters."""
        return {name: p * self.scales[name].to(p.dtype) for name, p in params.items()}

    def to(self, device: Any) -> Self:
        """As `Wrapper.to`, with the scales."""
        new = super().to(device)
        new.scales = {name: scale.to(device) for name, scale in self.scales.items()}
        return new


@dataclass(eq=False)
class ReducedBatch(Wrapper):
    """Fewer examples per step: ``fraction`` of the task's, rounded, at least one.

    Attributes:
        fraction: in (0, 1].
    """

    fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        self.task = copy.copy(self.task)  # a task that draws its batch from a key reads its own batch_size
        self.task.batch_size = max(1, round(self.fraction * self.task.batch_size))
        super().__post_init__()

    @property
    def label(self) -> str:
        """``batch`` and the examples per step."""
        return f"batch{self.task.batch_size}"


@dataclass(eq=False)
class Cast(Wrapper):
    """Training computes in another dtype: parameters, buffers and data are cast, and loss and gradients come back in theirs.

    Parameters themselves, the rule's state and judging stay as they are.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
    """

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        super().__post_init__()

    @property
    def label(self) -> str:
        """The dtype."""
        return self.dtype

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, computed in ``dtype``."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(DTYPES[self.dtype]) if tensor.is_floating_point() else tensor

        loss, new = self.task.training_loss(*(tree.map_tree(cast, part) for part in (params, buffers, batch)))
        dtype = next(iter(params.values())).dtype
        return loss.to(dtype), {name: b.to(buffers[name].dtype) for name, b in new.items()}


@dataclass(eq=False)
class LabelNoise(Wrapper):
    """In training, each ``label`` becomes one of the other classes, each as likely, with probability ``rate``.

    Drawn anew whenever an example is; valid and test labels stay.

    Attributes:
        rate: in [0, 1].
    """

    rate: float = 0.1

    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be in [0, 1], got {self.rate}")
        if "label" not in self.task.train.tensors:
            raise ValueError(f"label noise needs a task with labels, got {self.task.name}; wrap a classifier")
        super().__post_init__()
        self._classes = int(self.train.tensors["label"].max()) + 1

    @property
    def label(self) -> str:
        """``flip`` and the rate."""
        return f"flip{self.rate:g}"

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, on noisy labels."""
        return self.task.training_loss(params, buffers, batch | {"label": self.noisy(batch)})

    def noisy(self, batch: Batch) -> Tensor:
        """The labels that a step sees, as ``batch["label"]``."""
        labels, key = batch["label"], self._key(batch)
        flipped = uniform(key, labels.shape, 0) < self.rate
        shift = 1 + (uniform(key, labels.shape, 1) * (self._classes - 1)).long()
        return torch.where(flipped, (labels + shift) % self._classes, labels)


def augmented(
    name: str = "augmented",
    task: str = "digits_mlp",
    reparam: str = "none",
    reparam_low: float = 0.01,
    reparam_high: float = 100.0,
    batch_fraction: float = 1.0,
    label_noise: float = 0.0,
    dtype: str = "float32",
    loss_scale: float = 1.0,
    gradient_noise: float = 0.0,
    relative: bool = True,
    normalized: bool = False,
    delay: int = 0,
    seed: int = 0,
    device: Any = "cpu",
    **arguments: Any,
) -> Task:
    """A registered task with any augmentations around it, in this order from the inside out.

    Args:
        name: of the result.
        task: a registered task.
        reparam: level of `Reparametrized`, or ``none``; ``reparam_low``, ``reparam_high`` and ``seed`` go with it.
        reparam_low: the least scale.
        reparam_high: the largest scale.
        batch_fraction: of `ReducedBatch`; 1 for none.
        label_noise: rate of `LabelNoise`; 0 for none.
        dtype: of `Cast`; ``float32`` for none.
        loss_scale: factor of `LossScale`; 1 for none.
        gradient_noise: std of `GradientNoise`; 0 for none.
        relative: see `GradientNoise`.
        normalized: whether in `NormalizedGradients`.
        delay: of `DelayedGradients`; 0 for none.
        seed: of the scales.
        device: where the data live.
        **arguments: for the task inside (``data``, ``batch_size``, ``horizon``, ...).
    """
    made = registry.create("task", task, device=device, **arguments)
    if not isinstance(made, Task):
        raise ValueError(f"task must name one task, got {task!r}, a family; name one of its members")
    if reparam != "none":
        made = Reparametrized(made, reparam, reparam_low, reparam_high, seed)
    if batch_fraction != 1:
        made = ReducedBatch(made, batch_fraction)
    if label_noise:
        made = LabelNoise(made, label_noise)
    if dtype != "float32":
        made = Cast(made, dtype)
    if loss_scale != 1:
        made = LossScale(made, loss_scale)
    if gradient_noise:
        made = GradientNoise(made, gradient_noise, relative)
    if normalized:
        made = NormalizedGradients(made)
    if delay:
        made = DelayedGradients(made, delay)
    made.name = name
    return made
