"""What the learned optimizers share whose network sees features of a parameter and the time."""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce
from typing import ClassVar

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.perparameter import (
    TIME_SCALES,
    Decays,
    Layers,
    PerParameterRule,
    Prepared,
    layers_with_time,
    once,
    random_layers,
)
from metaopt.rule import Context, HyperValues, Params, State, hp_of
from metaopt.space import hyper, option


class TimedMLP(PerParameterRule):
    r"""A network of two hidden layers that takes normalised features of a parameter and eleven of the time t.

    .. math::
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, c\, d\, e^{k s}, \qquad
        (d, s, \dots) = \mathrm{MLP}(\mathrm{features}, \tanh(t/\tau_j - 1))

    with t = 0 first, H hidden units per layer, c = ``step_scale``, k = ``magnitude_scale``. A rule of this kind writes
    `features` and `decays`.
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned step")
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-6, 1e-1), doc="decoupled, times lr")
    hidden: int = option(4, low=1, doc="width H of both hidden layers")
    step_scale: float = option(0.001, doc="constant c of the step")
    magnitude_scale: float = option(0.001, doc="constant k in the exponent")
    outputs: ClassVar[int] = 2
    prepares_ahead = True

    @property
    def magnitude(self) -> float:
        """The constant in the exponent."""
        return self.magnitude_scale

    @abstractmethod
    def decays(self, theta: Theta) -> Decays:
        """Of the accumulators."""

    def init_theta(self, generator: Generator) -> Theta:
        """Truncated normal weights of variance 1 / fan-in, zero biases."""
        sizes = (self.features.count((1, 1)) + len(TIME_SCALES), self.hidden, self.hidden, self.outputs)
        return named(random_layers(sizes, generator))

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """One network for all parameters of one step count, with the time features in its first bias."""
        layers = layers_with_time(layers_of(theta), state, params, ctx)
        scale, keep = scale_and_keep(hp, params, theta["w0"], self.step_scale)
        return Prepared(self.decays(theta), layers, scale, keep, {})


def named(layers: Layers) -> Theta:
    """A network as meta-parameters: weight ``w0`` and bias ``b0`` of the first layer, and so on."""
    return {f"{kind}{i}": value for i, layer in enumerate(layers) for kind, value in zip("wb", layer, strict=True)}


def layers_of(theta: Theta) -> Layers:
    """Inverse of `named`, whatever else is in theta."""
    return tuple((theta[f"w{i}"], theta[f"b{i}"]) for i in range(sum(name.startswith("w") for name in theta)))


def scale_and_keep(
    hp: HyperValues, params: Params, like: Tensor, step_scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """lr ``step_scale``, and 1 - lr weight_decay, of each parameter; in the widest dtype of parameters and ``like``."""
    dtype = reduce(torch.promote_types, {param.dtype for param in params.values()}, like.dtype)

    def of(own: HyperValues) -> tuple[Tensor, Tensor]:
        lr = (like.new_ones((), dtype=dtype) * own["lr"]).to(dtype)  # a copy of the number would make the host wait
        return lr * step_scale, 1 - lr * own["weight_decay"]

    found = once(of, {name: hp_of(hp, name) for name in params})
    return {name: scale for name, (scale, _) in found.items()}, {name: keep for name, (_, keep) in found.items()}
