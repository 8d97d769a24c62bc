"""Autoencoders of images: through a narrow code and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.dense.network import DenseNetwork
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.conv import conv, halved
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, hidden_weight, linear
from metaopt_tasks.scales import ScaledTask

CRITERIA = ("mse", "bce")
CODERS = ("mlp", "conv")


@dataclass(frozen=True)
class Coder(ABC):
    """An encoder and the decoder that mirrors it.

    Attributes:
        shape: of one example.
        widths: of the encoder's hidden layers; the decoder's are these backwards.
        code: numbers in the code; ``encode`` gives ``code * moments``.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        moments: numbers that the encoder gives for each of the code's.
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...]
    code: int
    activation: str
    moments: int = 1

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        if self.code < 1 or not self.widths or min(self.widths) < 1:
            raise ValueError(f"code and one or more widths must be at least 1, got {self.code} and {self.widths}")

    @abstractmethod
    def init(self, generator: Generator) -> Params:
        """Normal weights scaled for the activation, small ones to the code and to the pixels, zero biases."""

    @abstractmethod
    def encode(self, params: Params, x: Tensor) -> Tensor:
        """Examples [B, *shape] -> [B, code * moments]."""

    @abstractmethod
    def decode(self, params: Params, code: Tensor) -> Tensor:
        """Codes [B, code] -> [B, *shape]."""

    def roles(self) -> dict[str, str]:
        """Roles that names do not tell: the code is as narrow as an output, so what leads there and back is one too."""
        last = f"decoder{len(self.widths) + 1}.weight"
        return {"encoder1.weight": "input", "code.weight": "output", "decoder1.weight": "input", last: "output"}


def _layer(name: str, shape: tuple[int, ...], generator: Generator, gain: float | None = None) -> Params:
    """Without a gain, entries have standard deviation 1 / fan_in, as in `output_weight`: what they give starts near 0."""
    if gain is None:
        gain = 1 / math.sqrt(math.prod(shape[1:]))
    return {f"{name}.weight": hidden_weight(shape, generator, gain), f"{name}.bias": torch.zeros(shape[0])}


@dataclass(frozen=True)
class MLPCoder(Coder):
    """Fully connected layers, the code linear."""

    def init(self, generator: Generator) -> Params:
        """Normal weights scaled for the activation, small ones to the code and to the pixels, zero biases."""
        gain = ACTIVATIONS[self.activation][1]
        sizes = [math.prod(self.shape), *self.widths]
        params: Params = {}
        for i, (old, new) in enumerate(pairwise(sizes), start=1):
            params |= _layer(f"encoder{i}", (new, old), generator, gain)
        params |= _layer("code", (self.code * self.moments, sizes[-1]), generator)
        for i, (old, new) in enumerate(pairwise([self.code, *reversed(sizes)]), start=1):
            last = i > len(self.widths)
            params |= _layer(f"decoder{i}", (new, old), generator, None if last else gain)
        return params

    def encode(self, params: Params, x: Tensor) -> Tensor:
        """Examples [B, *shape] -> [B, code * moments]."""
        act, h = ACTIVATIONS[self.activation][0], x.flatten(1)
        for i in range(1, len(self.widths) + 1):
            h = act(linear(params, f"encoder{i}", h))
        return linear(params, "code", h)

    def decode(self, params: Params, code: Tensor) -> Tensor:
        """Codes [B, code] -> [B, *shape]."""
        act, h = ACTIVATIONS[self.activation][0], code
        for i in range(1, len(self.widths) + 1):
            h = act(linear(params, f"decoder{i}", h))
        return linear(params, f"decoder{len(self.widths) + 1}", h).unflatten(1, self.shape)


@dataclass(frozen=True)
class ConvCoder(Coder):
    """3-wide convolutions of stride 2 down to a linear code; a linear layer, then doublings and convolutions up again.

    ``widths`` are channels. Doubling repeats pixels, which leaves no checkerboard (Odena et al. 2016).
    """

    def _sizes(self) -> list[tuple[int, ...]]:
        """Of the maps, from the input to the smallest."""
        return [halved(self.shape[1:], times) for times in range(len(self.widths) + 1)]

    def init(self, generator: Generator) -> Params:
        """Normal weights scaled for the activation, small ones to the code and to the pixels, zero biases."""
        gain, window = ACTIVATIONS[self.activation][1], [3] * (len(self.shape) - 1)
        channels = [self.shape[0], *self.widths]
        features = channels[-1] * math.prod(self._sizes()[-1])
        params: Params = {}
        for i, (old, new) in enumerate(pairwise(channels), start=1):
            params |= _layer(f"encoder{i}", (new, old, *window), generator, gain)
        params |= _layer("code", (self.code * self.moments, features), generator)
        params |= _layer("decoder1", (features, self.code), generator, gain)
        for i, (old, new) in enumerate(pairwise(reversed(channels)), start=2):
            last = i > len(self.widths)
            params |= _layer(f"decoder{i}", (new, old, *window), generator, None if last else gain)
        return params

    def encode(self, params: Params, x: Tensor) -> Tensor:
        """Examples [B, *shape] -> [B, code * moments]."""
        act, h = ACTIVATIONS[self.activation][0], x
        for i in range(1, len(self.widths) + 1):
            h = act(conv(params, f"encoder{i}", h, stride=2))
        return linear(params, "code", h.flatten(1))

    def decode(self, params: Params, code: Tensor) -> Tensor:
        """Codes [B, code] -> [B, *shape]."""
        act, sizes = ACTIVATIONS[self.activation][0], self._sizes()
        h = linear(params, "decoder1", code).unflatten(1, (self.widths[-1], *sizes[-1]))
        for i, size in enumerate(reversed(sizes[:-1]), start=2):
            h = conv(params, f"decoder{i}", F.interpolate(act(h), size))
        return h


@dataclass(eq=False)
class Autoencoder(ScaledTask):
    """Reconstructs its input [B, ...]; the loss is a mean over pixels.

    ``mse`` compares with the input as it is. ``bce`` compares logits with the input squeezed linearly into [0, 1], by the
    least and the greatest number of the train part. Normalised, 0 is a perfect reconstruction and 1 a decoder that gives
    zeros: the mean pixel, or one half.

    Attributes:
        coder: encoder and decoder.
        criterion: ``mse`` or ``bce``.
    """

    coder: Coder = field(default_factory=lambda: MLPCoder((1, 8, 8), (32,), 8, "relu"))
    criterion: str = "mse"

    def __post_init__(self) -> None:
        require_choice("criterion", self.criterion, CRITERIA)
        inputs = self.train.tensors["input"]
        if self.criterion == "bce":
            self._low, self._high = float(inputs.min()), float(inputs.max())
        self.floor, self.scale = self._floor_and_scale(self.targets(inputs))

    def _floor_and_scale(self, targets: Tensor) -> tuple[float, float]:
        """The lowest loss, and how far above it a decoder is that gives zeros."""
        if self.criterion == "mse":
            return 0.0, float(targets.square().mean())
        entropy = -torch.xlogy(targets, targets) - torch.xlogy(1 - targets, 1 - targets)
        floor = float(entropy.mean())
        return floor, math.log(2) - floor

    def init(self, generator: Generator) -> Params:
        """As the coder's."""
        return self.coder.init(generator)

    def targets(self, inputs: Tensor) -> Tensor:
        """What a decoder should give for ``inputs`` [B, ...]."""
        if self.criterion == "mse":
            return inputs
        return ((inputs - self._low) / (self._high - self._low)).clamp(0, 1)

    def reconstruction(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Mean over pixels of the distance of a decoder's ``outputs`` from its ``inputs``, both [B, ...]."""
        if self.criterion == "mse":
            return F.mse_loss(outputs, inputs)
        return F.binary_cross_entropy_with_logits(outputs, self.targets(inputs))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean reconstruction loss of ``input`` [B, ...]."""
        inputs = batch["input"]
        return self.reconstruction(self.coder.decode(params, self.coder.encode(params, inputs)), inputs)

    @property
    def dense(self) -> DenseNetwork | None:
        """Of ``mse`` without convolutions; a subclass, whose training loss may be another, has none."""
        coder = self.coder
        if type(self) is not Autoencoder or not isinstance(coder, MLPCoder) or self.criterion != "mse":
            return None
        depth = len(coder.widths)
        names = [f"encoder{i}" for i in range(1, depth + 1)] + ["code"] + [f"decoder{i}" for i in range(1, depth + 2)]
        layers = tuple((f"{name}.weight", f"{name}.bias") for name in names)
        hidden = (coder.activation,) * depth
        return DenseNetwork(layers, (*hidden, "linear", *hidden), "mse", target="input")

    def info(self) -> dict[str, ParamInfo]:
        """From the pixels and from the code are inputs, to the code and to the pixels outputs."""
        return infer_info(self.init(Generator().manual_seed(0)), self.coder.roles())


def make_coder(
    kind: str, data: dict[str, Split], widths: Sequence[int], code: int, activation: str, moments: int = 1
) -> Coder:
    """A `Coder` of this ``kind`` (``mlp`` or ``conv``) for these data."""
    require_choice("coder", kind, CODERS)
    shape = tuple(data["train"].tensors["input"].shape[1:])
    if kind == "conv" and len(shape) < 2:
        raise ValueError(f"coder 'conv' takes images [C, H, W] or series [C, T], got examples of shape {shape}")
    return (ConvCoder if kind == "conv" else MLPCoder)(shape, tuple(widths), code, activation, moments)


def autoencoder(
    name: str = "autoencoder",
    data: str = "digits",
    coder: str = "mlp",
    widths: Sequence[int] = (32,),
    code: int = 8,
    activation: str = "relu",
    criterion: str = "mse",
    batch_size: int = 64,
    horizon: int = 500,
    device: Any = "cpu",
) -> Autoencoder:
    """An autoencoder of any source with ``input``; ``coder`` is ``mlp`` or ``conv``; see `Coder` and `Autoencoder`."""
    splits = load(data, device)
    return Autoencoder(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon,
        coder=make_coder(coder, splits, widths, code, activation), criterion=criterion,
    )  # fmt: skip
