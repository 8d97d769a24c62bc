"""Convolutional networks on images and series, and what the other convolutional families build on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.choices import require_choice
from metaopt_tasks.classifier import Classifier
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import ACTIVATIONS, hidden_weight, linear, output_weight

CHANNEL_NORMS = ("none", "layer", "group")
DOWNSAMPLES = ("stride", "max", "average", "none")
HEADS = ("flatten", "mean")
GROUP_WIDTH = 4  # channels that group norm takes together


def conv(params: Params, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """``x`` [B, C, *size] convolved with ``{name}.weight`` [out, C, *kernel], size kept (or divided by ``stride``)."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    convolve = F.conv1d if weight.dim() == 3 else F.conv2d
    return convolve(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)


def channel_norm_params(name: str, channels: int, kind: str) -> Params:
    """Initial parameters of `channel_norm`: ones and zeros."""
    require_choice("norm", kind, CHANNEL_NORMS)
    if kind == "none":
        return {}
    return {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.zeros(channels)}


def channel_norm(params: Params, name: str, x: Tensor, kind: str) -> Tensor:
    """Norms of ``x`` [B, C, *size] that need no batch: nothing, ``layer`` or ``group``.

    ``layer`` normalises each position over its channels (as ConvNeXt does, Liu et al. 2022, arXiv:2201.03545), ``group``
    each image over groups of `GROUP_WIDTH` channels (Wu and He 2018, arXiv:1803.08494).
    """
    if kind == "none":
        return x
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    if kind == "layer":
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias).movedim(-1, 1)
    return F.group_norm(x, len(weight) // GROUP_WIDTH, weight, bias)


def require_channels(channels: Sequence[int], norm: str) -> None:
    """Raise ``ValueError`` unless ``norm`` exists and can take these numbers of channels."""
    require_choice("norm", norm, CHANNEL_NORMS)
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be one or more numbers of at least 1, got {tuple(channels)}")
    if norm == "group" and any(c % GROUP_WIDTH for c in channels):
        raise ValueError(f"channels must be multiples of {GROUP_WIDTH} for norm 'group', got {tuple(channels)}")


def halved(size: Sequence[int], times: int) -> tuple[int, ...]:
    """Each of ``size`` after ``times`` halvings that round up."""
    return tuple(-(-n // 2**times) for n in size)


@dataclass(eq=False)
class ConvNet(Classifier):
    """Convolutions, each followed by norm and activation and halving the map, and a linear head.

    Inputs are images [B, C, H, W] or series [B, C, T].

    Attributes:
        channels: of the convolutions, input to output.
        kernel: width of the kernels, odd.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: a name in `metaopt_tasks.layers.INITIALIZERS`, scaled for the activation.
        norm: ``none``, ``layer`` or ``group``, in front of each activation; see `channel_norm`.
        downsample: what halves the map (rounding up): ``stride`` 2, ``max`` or ``average`` pooling of pairs, or ``none``.
        head: on the ``flatten``-ed map, or on its ``mean`` over positions.
    """

    channels: tuple[int, ...] = (8, 16)
    kernel: int = 3
    activation: str = "relu"
    initializer: str = "normal"
    norm: str = "none"
    downsample: str = "stride"
    head: str = "flatten"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("downsample", self.downsample, DOWNSAMPLES)
        require_choice("head", self.head, HEADS)
        require_channels(self.channels, self.norm)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {self.kernel}")

    def init(self, generator: Generator) -> Params:
        """Kernels by ``initializer``, a small head, zero biases."""
        depth, *size = self.train.tensors["input"].shape[1:]
        gain = ACTIVATIONS[self.activation][1]
        params: Params = {}
        for i, new in enumerate(self.channels, start=1):
            shape = (new, depth, *[self.kernel] * len(size))
            params[f"conv{i}.weight"] = hidden_weight(shape, generator, gain, self.initializer)
            params[f"conv{i}.bias"] = torch.zeros(new)
            params |= channel_norm_params(f"norm{i}", new, self.norm)
            depth = new
        if self.head == "flatten":
            depth *= math.prod(halved(size, 0 if self.downsample == "none" else len(self.channels)))
        return params | {
            "head.weight": output_weight((self.classes, depth), generator),
            "head.bias": torch.zeros(self.classes),
        }

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Inputs [B, C, H, W] or [B, C, T] -> logits [B, classes]."""
        act = ACTIVATIONS[self.activation][0]
        h = inputs
        for i in range(1, len(self.channels) + 1):
            h = conv(params, f"conv{i}", h, 2 if self.downsample == "stride" else 1)
            h = self._pool(act(channel_norm(params, f"norm{i}", h, self.norm)))
        return linear(params, "head", h.flatten(1) if self.head == "flatten" else h.flatten(2).mean(2))

    def _pool(self, h: Tensor) -> Tensor:
        series = h.dim() == 3
        if self.downsample == "max":
            return (F.max_pool1d if series else F.max_pool2d)(h, 2, ceil_mode=True)
        if self.downsample == "average":
            return (F.avg_pool1d if series else F.avg_pool2d)(h, 2, ceil_mode=True)
        return h

    def info(self) -> dict[str, ParamInfo]:
        """The first convolution is the input, the others hidden, the head the output."""
        return infer_info(self.init(Generator().manual_seed(0)), {"conv1.weight": "input", "head.weight": "output"})


def conv_classifier(
    name: str = "conv",
    data: str = "digits",
    channels: Sequence[int] = (8, 16),
    kernel: int = 3,
    activation: str = "relu",
    initializer: str = "normal",
    norm: str = "none",
    downsample: str = "stride",
    head: str = "flatten",
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> ConvNet:
    """A convolutional network on labelled images [N, C, H, W] or series [N, C, T]; see `ConvNet` for the arguments."""
    splits = load(data, device)
    return ConvNet(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes_of(splits),
        channels=tuple(channels), kernel=kernel, activation=activation, initializer=initializer, norm=norm,
        downsample=downsample, head=head,
    )  # fmt: skip
