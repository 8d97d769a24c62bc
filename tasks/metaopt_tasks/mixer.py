"""MLP-Mixers on images and series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.blocks import NORMS, two_layer, two_layer_params
from metaopt_tasks.choices import require_choice
from metaopt_tasks.classifier import Classifier
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import ACTIVATIONS, hidden_weight, linear, norm, norm_params, output_weight
from metaopt_tasks.vit import patches, token_shape


@dataclass(eq=False)
class Mixer(Classifier):
    """An MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) on images [B, C, H, W] or series [B, C, T].

    Each block adds an MLP over the tokens of each channel, then one over the channels of each token, both pre-norm.

    Attributes:
        patch: width of a patch; divides the inputs' size.
        width: channels of a token.
        layers: how many blocks.
        token_width: hidden width of the MLPs over tokens.
        channel_width: hidden width of the MLPs over channels.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        norm: ``layer`` or ``rms``.
    """

    patch: int = 2
    width: int = 32
    layers: int = 1
    token_width: int = 16
    channel_width: int = 64
    activation: str = "gelu"
    norm: str = "layer"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("norm", self.norm, NORMS)
        token_shape(tuple(self.train.tensors["input"].shape[1:]), self.patch)

    def init(self, generator: Generator) -> Params:
        """Normal matrices (scaled for the activation in front of it, LeCun / sqrt(2 layers) in front of the residual
        stream), a small head, zero biases."""
        tokens, numbers = token_shape(tuple(self.train.tensors["input"].shape[1:]), self.patch)
        gain, damping = ACTIVATIONS[self.activation][1], 1 / math.sqrt(2 * self.layers)
        params = {
            "patch.weight": hidden_weight((self.width, numbers), generator),
            "patch.bias": torch.zeros(self.width),
        }
        for i in range(1, self.layers + 1):
            for part, outer, inner in (
                ("token", tokens, self.token_width),
                ("channel", self.width, self.channel_width),
            ):
                params |= norm_params(f"block{i}.{part}.norm", self.width, self.norm)
                params |= two_layer_params(f"block{i}.{part}.", outer, inner, generator, gain, damping)
        return params | norm_params("norm", self.width, self.norm) | {
            "head.weight": output_weight((self.classes, self.width), generator),
            "head.bias": torch.zeros(self.classes),
        }  # fmt: skip

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Inputs [B, C, H, W] or [B, C, T] -> logits [B, classes]."""
        h = linear(params, "patch", patches(inputs, self.patch))
        for i in range(1, self.layers + 1):
            h = h + self._branch(params, f"block{i}.token", h, transposed=True)
            h = h + self._branch(params, f"block{i}.channel", h, transposed=False)
        return linear(params, "head", norm(params, "norm", h, self.norm).mean(1))

    def _branch(self, params: Params, name: str, h: Tensor, transposed: bool) -> Tensor:
        h = norm(params, f"{name}.norm", h, self.norm)
        h = h.transpose(1, 2) if transposed else h
        h = two_layer(params, f"{name}.", h, ACTIVATIONS[self.activation][0])
        return h.transpose(1, 2) if transposed else h

    def info(self) -> dict[str, ParamInfo]:
        """The patch map is the input, the head the output, all other matrices are hidden."""
        return infer_info(self.init(Generator().manual_seed(0)), {"patch.weight": "input", "head.weight": "output"})


def mixer(
    name: str = "mixer",
    data: str = "digits",
    patch: int = 2,
    width: int = 32,
    layers: int = 1,
    token_width: int = 16,
    channel_width: int = 64,
    activation: str = "gelu",
    norm: str = "layer",
    batch_size: int = 32,
    horizon: int = 500,
    device: Any = "cpu",
) -> Mixer:
    """An MLP-Mixer on labelled images [N, C, H, W] or series [N, C, T]; see `Mixer` for the arguments."""
    splits = load(data, device)
    return Mixer(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes_of(splits),
        patch=patch, width=width, layers=layers, token_width=token_width, channel_width=channel_width,
        activation=activation, norm=norm,
    )  # fmt: skip
