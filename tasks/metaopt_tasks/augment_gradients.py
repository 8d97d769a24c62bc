"""Augmentations that change the gradient of a training loss and leave its value alone.

Back-propagation through an unroll takes the changed gradient for the derivative of that value, too (as in any `Game`);
evolution strategies, and judging by the task's ``loss``, do not care.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value

from metaopt.random import normal
from metaopt.rule import Params
from metaopt.task import Batch
from metaopt_tasks.wrapper import Wrapper


@dataclass(eq=False)
class LossScale(Wrapper):
    """Gradients are those of the loss times ``factor``; the value of the loss stays, so that it remains comparable.

    Attributes:
        factor: above 0.
    """

    factor: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor must be above 0 and finite, got {self.factor}")
        super().__post_init__()

    @property
    def label(self) -> str:
        """``scale`` and the factor."""
        return f"scale{self.factor:g}"

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, with scaled gradients."""
        loss, buffers = self.task.training_loss(params, buffers, batch)
        return loss.detach() + self.factor * (loss - loss.detach()), buffers


@dataclass(eq=False)
class GradientNoise(Wrapper):
    """Independent normal noise in every coordinate of every gradient; the value of the loss stays.

    Attributes:
        std: its standard deviation; at least 0.
        relative: whether in units of the root mean square of that tensor's gradient.
    """

    std: float = 0.1
    relative: bool = True

    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std must be at least 0 and finite, got {self.std}")
        super().__post_init__()

    @property
    def label(self) -> str:
        """``noise``, the standard deviation, and ``abs`` if it is not relative."""
        return f"noise{self.std:g}{'' if self.relative else 'abs'}"

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, with noisy gradients."""
        key = self._key(batch)
        gradients, (loss, buffers) = grad_and_value(self.task.training_loss, has_aux=True)(params, buffers, batch)
        draws = normal(key, (sum(g.numel() for g in gradients.values()),), dtype=loss.dtype)
        noisy = {}
        for (name, g), noise in zip(
            gradients.items(), draws.split([g.numel() for g in gradients.values()]), strict=True
        ):
            size = g.square().mean().sqrt() if self.relative else 1.0
            noisy[name] = g + self.std * size * noise.reshape(g.shape)
        return with_gradients(loss, params, noisy), buffers


@dataclass(eq=False)
class NormalizedGradients(Wrapper):
    """The gradient of all parameters together has norm 1 (or 0); the value of the loss stays."""

    @property
    def label(self) -> str:
        """``normalized``."""
        return "normalized"

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's, with normalised gradients."""

        gradients, (loss, buffers) = grad_and_value(self.task.training_loss, has_aux=True)(params, buffers, batch)
        square = torch.stack([g.square().sum() for g in gradients.values()]).sum()
        scale = torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)  # twice: no NaN from 0
        return with_gradients(loss, params, {name: g * scale for name, g in gradients.items()}), buffers


@dataclass(eq=False)
class DelayedGradients(Wrapper):
    """Each step gets the gradient of ``delay`` steps before, as from an asynchronous worker; zeros in the first ones.

    The value of the loss is that of the current parameters and batch. The gradients under way are in the buffers.

    Attributes:
        delay: in steps, 1 to 8 (a step copies that many gradients).
    """

    delay: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.delay <= 8:
            raise ValueError(f"delay must be in [1, 8], got {self.delay}")
        super().__post_init__()
        self._prefix = f"delayed{self._depth}."

    @property
    def label(self) -> str:
        """``delay`` and the number of steps."""
        return f"delay{self.delay}"

    def buffers(self) -> Params:
        """The task's, and of each parameter the gradients under way [delay, *shape], the oldest first."""
        shapes = {name: info.shape for name, info in self.task.info().items()}
        under_way = {
            self._prefix + name: torch.zeros(self.delay, *shape, device=self.device) for name, shape in shapes.items()
        }
        return self.task.buffers() | under_way

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The task's loss, whose gradient is the oldest under way."""
        own = {name: b for name, b in buffers.items() if not name.startswith(self._prefix)}
        gradients, (loss, own) = grad_and_value(self.task.training_loss, has_aux=True)(params, own, batch)
        oldest, under_way = {}, {}
        for name, g in gradients.items():
            queue = buffers[self._prefix + name]
            oldest[name] = queue[0]
            under_way[self._prefix + name] = torch.cat([queue[1:], g.unsqueeze(0).to(queue.dtype)])
        return with_gradients(loss, params, oldest), own | under_way


def with_gradients(loss: Tensor, params: Params, gradients: Params) -> Tensor:
    """``loss``, whose gradient in ``params`` is ``gradients``; vmap-safe, and second derivatives are those of ``gradients``."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("torch.compile does not take custom gradients under vmap; use the eager back-end")
    return _WithGradients.apply(loss, len(params), *params.values(), *(gradients[name] for name in params))


class _WithGradients(torch.autograd.Function):
    """Not ``(gradients * (params - params.detach())).sum()``, which would count their own dependence on ``params`` twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, count, *tensors = inputs
        ctx.save_for_backward(*tensors[count:])

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return None, None, *(of_loss * gradient for gradient in saved), *(None for _ in saved)
