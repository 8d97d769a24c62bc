"""Physics-informed networks: an MLP that is to satisfy a differential equation and its boundary values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.equations import EQUATIONS
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, linear, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

Slopes = tuple[Tensor, Tensor, Tensor]


def _tanh(x: Tensor) -> Slopes:
    y = x.tanh()
    slope = 1 - y.square()
    return y, slope, -2 * y * slope


def _sin(x: Tensor) -> Slopes:
    y = x.sin()
    return y, x.cos(), -y


def _silu(x: Tensor) -> Slopes:
    s = x.sigmoid()
    bend = s * (1 - s)
    return x * s, s + x * bend, bend * (2 + x * (1 - 2 * s))


def _softplus(x: Tensor) -> Slopes:
    s = x.sigmoid()
    return F.softplus(x), s, s * (1 - s)


def _gelu(x: Tensor) -> Slopes:
    below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    at = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    return x * below, below + x * at, at * (2 - x.square())


SMOOTH: Mapping[str, Callable[[Tensor], Slopes]] = {
    "tanh": _tanh,
    "sin": _sin,
    "silu": _silu,
    "softplus": _softplus,
    "gelu": _gelu,
}
"""Name of an activation -> its value, first and second derivative."""


@dataclass(eq=False)
class PINN(ScaledTask):
    """An MLP u(x) trained on an equation and judged by its solution (Raissi et al. 2019, arXiv:1711.10561).

    Training minimises mean |residual|^2 at ``input`` + boundary_weight * mean |u - boundary_target|^2 at ``boundary``;
    the solution ``target`` is used by `loss` only.

    Attributes:
        equation: a name in `metaopt_tasks.data.equations.EQUATIONS`.
        hidden: widths.
        activation: a name in `SMOOTH`.
        initializer: of the hidden weights; a name in `metaopt_tasks.layers.INITIALIZERS`.
        boundary_weight: above 0.
    """

    equation: str = "poisson_equation"
    hidden: tuple[int, ...] = (32, 32)
    activation: str = "tanh"
    initializer: str = "normal"
    boundary_weight: float = 10.0

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, SMOOTH)
        if self.boundary_weight <= 0:
            raise ValueError(
                f"boundary_weight must be above 0, got {self.boundary_weight}; without it 0 may be a solution"
            )
        equation = EQUATIONS[self.equation]
        lower, upper = (
            torch.tensor(end, dtype=torch.float64, device=self.device) for end in (equation.lower, equation.upper)
        )
        self._lower, self._slope = lower, 2 / (upper - lower)

    def init(self, generator: Generator) -> Params:
        """Hidden weights by ``initializer``, a small head, zero biases."""
        inputs, outputs = (self.train.tensors[key].shape[1] for key in ("input", "target"))
        gain = ACTIVATIONS[self.activation][1]
        return mlp_params((inputs, *self.hidden, outputs), generator, gain, initializer=self.initializer)

    def info(self) -> dict[str, ParamInfo]:
        """The first layer is the input."""
        return infer_info(self.init(Generator().manual_seed(0)), {"fc1.weight": "input"})

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The box of the equation as [-1, 1]^d: points [B, d] there, and the slopes [d] of that map."""
        slope = self._slope.to(x.dtype)
        return (x - self._lower.to(x.dtype)) * slope - 1, slope

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Points [B, d] -> values [B, m]."""
        return mlp(params, self._scaled(x)[0], ACTIVATIONS[self.activation][0])

    def derivatives(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, m] at points [B, d], and its first and second derivatives in each coordinate, [d, B, m] both.

        Carried forward through the layers by the chain rule, which is much faster than nested differentiation:
        (f o z)' = f'(z) z' and (f o z)'' = f''(z) z'^2 + f'(z) z''. Second derivatives are zeros for an equation of order 1.
        """
        h, slope = self._scaled(x)
        first = slope.diag()[:, None].expand(-1, *x.shape)
        second = torch.zeros_like(first)
        curved = EQUATIONS[self.equation].order == 2
        for i in range(1, len(self.hidden) + 1):
            weight = params[f"fc{i}.weight"].T
            h, d, dd = SMOOTH[self.activation](linear(params, f"fc{i}", h))
            first = first @ weight
            if curved:
                second = dd * first.square() + (d * (second @ weight) if i > 1 else 0)
            first = d * first
        weight = params["head.weight"].T
        first, last = first @ weight, linear(params, "head", h)
        return last, first, second @ weight if curved else torch.zeros_like(first)

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Mean squared residual plus the weighted mean squared error of the boundary values."""
        x = batch["input"]
        residual = EQUATIONS[self.equation].residual(x, *self.derivatives(params, x))
        error = self.predict(params, batch["boundary"]) - batch["boundary_target"]
        return residual.square().mean() + self.boundary_weight * error.square().mean(), buffers

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean squared error at ``input`` [B, d] against the solution ``target`` [B, m]."""
        return (self.predict(params, batch["input"]) - batch["target"]).square().mean()


def pinn(
    name: str = "pinn",
    data: str = "poisson_equation",
    hidden: Sequence[int] = (32, 32),
    activation: str = "tanh",
    initializer: str = "normal",
    boundary_weight: float = 10.0,
    batch_size: int = 64,
    horizon: int = 500,
    device: Any = "cpu",
) -> PINN:
    """A physics-informed network for the equation ``data``, whose loss is measured in that of u = 0; see `PINN`."""
    require_choice("data", data, EQUATIONS)
    splits = load(data, device)
    scale = float(splits["valid"].tensors["target"].square().mean())
    return PINN(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, scale=scale, equation=data,
        hidden=tuple(hidden), activation=activation, initializer=initializer, boundary_weight=boundary_weight,
    )  # fmt: skip
