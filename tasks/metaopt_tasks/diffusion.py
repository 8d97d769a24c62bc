"""Diffusion models: denoising at a random noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from metaopt.random import normal, uniform
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask


def _cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    return (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()


def _linear(t: Tensor) -> tuple[Tensor, Tensor]:
    log_signal = -0.25 * t.square() * (20 - 0.1) - 0.5 * t * 0.1
    return log_signal.exp(), (-torch.expm1(2 * log_signal)).sqrt()


def _log_uniform(t: Tensor) -> tuple[Tensor, Tensor]:
    ratio = (math.log(0.02) + t * math.log(20 / 0.02)).exp()
    return (1 + ratio.square()).rsqrt(), ratio * (1 + ratio.square()).rsqrt()


def _straight(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t, t


SCHEDULES: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "cosine": _cosine,
    "linear": _linear,
    "log_uniform": _log_uniform,
    "straight": _straight,
}
"""Name -> (signal, noise) at time t in (0, 1), for x_t = signal * x + noise * e.

``cosine``: Nichol and Dhariwal 2021, arXiv:2102.09672; ``linear``: Ho et al. 2020, arXiv:2006.11239, in continuous time
with beta from 0.1 to 20 (Song et al. 2021, arXiv:2011.13456); ``log_uniform``: noise / signal log-uniform in [0.02, 20];
``straight``: flow matching's (Lipman et al. 2023, arXiv:2210.02747).
"""

TARGETS: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "noise": lambda signal, noise: (torch.zeros_like(signal), torch.ones_like(noise)),
    "data": lambda signal, noise: (torch.ones_like(signal), torch.zeros_like(noise)),
    "flow": lambda signal, noise: (-torch.ones_like(signal), torch.ones_like(noise)),
}
"""Name -> (c, e) for the target c * x + e * noise.

Ho et al.'s predicts the noise, flow matching the velocity of the straight path. Salimans and Ho's velocity is missing:
for standardised data even the best prediction of it hardly beats zero, which leaves nothing to judge by.
"""

_FIRST, _LAST = 0.01, 0.99  # times in between, so that no weight is infinite


@dataclass(eq=False)
class Diffusion(ScaledTask):
    """An MLP predicts a mixture of point and noise from signal * x + noise * e and time; the loss is the squared error.

    Times are spread evenly from a keyed start (Kingma et al. 2021, arXiv:2107.00630, appendix I), the noise e is keyed.
    A network that predicts noise learns the score of the blurred density (Vincent 2011).

    Attributes:
        hidden: widths.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: of the hidden weights; a name in `metaopt_tasks.layers.INITIALIZERS`.
        schedule: a name in `SCHEDULES`.
        predicts: a name in `TARGETS`.
        frequencies: time enters as cos(k pi t), k = 1 ... frequencies.
    """

    stochastic: ClassVar[bool] = True

    hidden: tuple[int, ...] = (64, 64)
    activation: str = "silu"
    initializer: str = "normal"
    schedule: str = "cosine"
    predicts: str = "noise"
    frequencies: int = 4

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("predicts", self.predicts, TARGETS)
        self._dim = self.train.tensors["input"].shape[1]

    def init(self, generator: Generator) -> Params:
        """Hidden weights by ``initializer``, a small head, zero biases."""
        widths = (self._dim + self.frequencies, *self.hidden, self._dim)
        return mlp_params(widths, generator, ACTIVATIONS[self.activation][1], initializer=self.initializer)

    def info(self) -> dict[str, ParamInfo]:
        """The first layer is the input."""
        return infer_info(self.init(Generator().manual_seed(0)), {"fc1.weight": "input"})

    def predict(self, params: Params, noisy: Tensor, t: Tensor) -> Tensor:
        """Noisy points [B, d] at times [B, 1] -> targets [B, d]."""
        orders = torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        return mlp(params, torch.cat([noisy, (math.pi * orders * t).cos()], -1), ACTIVATIONS[self.activation][0])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean squared error of the target of ``input`` [B, d], over coordinates, times and noise."""
        x, key = batch["input"], batch["random"]
        evenly = torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None] / len(x)
        t = _FIRST + (_LAST - _FIRST) * ((evenly + uniform(key, (1, 1), 0, x.dtype)) % 1)
        e = normal(key, x.shape, 1, x.dtype)
        signal, noise = SCHEDULES[self.schedule](t)
        of_x, of_e = TARGETS[self.predicts](signal, noise)
        return (self.predict(params, signal * x + noise * e, t) - of_x * x - of_e * e).square().mean()


@cache
def lowest_loss(data: str, schedule: str, predicts: str, draws: int = 4096) -> float:
    """The loss of the best denoiser of the train points themselves: a lower bound of what generalises, by Monte Carlo.

    Given x_t, point i has posterior weight softmax_i of -|x_t - signal x_i|^2 / (2 noise^2). An error d in the posterior
    mean of x is an error of -(signal / noise) d in that of e, hence of (c - e signal / noise) d in the target.
    """
    points = load(data)["train"].tensors["input"].double().cpu()
    generator = Generator().manual_seed(0)
    x = points[torch.randint(len(points), (draws,), generator=generator)]
    t = _FIRST + (_LAST - _FIRST) * (torch.arange(draws, dtype=torch.float64)[:, None] + 0.5) / draws
    signal, noise = SCHEDULES[schedule](t)
    noisy = signal * x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    error = torch.empty_like(x)
    for part in torch.arange(draws).split(512):
        distance = torch.cdist(noisy[part] / signal[part], points)
        weights = (-0.5 * (distance * signal[part] / noise[part]).square()).softmax(-1)
        error[part] = weights @ points - x[part]
    of_x, of_e = TARGETS[predicts](signal, noise)
    return float(((of_x - of_e * signal / noise) * error).square().mean())


def diffusion(
    name: str = "diffusion",
    data: str = "moons2d",
    hidden: Sequence[int] = (64, 64),
    activation: str = "silu",
    initializer: str = "normal",
    schedule: str = "cosine",
    predicts: str = "noise",
    batch_size: int = 128,
    horizon: int = 500,
    device: Any = "cpu",
) -> Diffusion:
    """A diffusion model of standardised points ``input`` [N, d]; see `Diffusion`.

    Normalised losses are 0 for the best denoiser of the train points (`lowest_loss`) and 1 for predicting zero.
    """
    splits = load(data, device)
    require_choice("schedule", schedule, SCHEDULES)
    require_choice("predicts", predicts, TARGETS)
    floor = lowest_loss(data, schedule, predicts)
    t = _FIRST + (_LAST - _FIRST) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    of_x, of_e = TARGETS[predicts](*SCHEDULES[schedule](t))
    of_zero = float((of_x.square() + of_e.square()).mean())
    return Diffusion(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, floor=floor, scale=of_zero - floor,
        hidden=tuple(hidden), activation=activation, initializer=initializer, schedule=schedule, predicts=predicts,
    )  # fmt: skip
