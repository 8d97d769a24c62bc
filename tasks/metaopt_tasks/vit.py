"""Vision transformers on images and series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.blocks import NORMS, block, block_params
from metaopt_tasks.choices import require_choice
from metaopt_tasks.classifier import Classifier
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import (
    ACTIVATIONS,
    attention,
    hidden_weight,
    linear,
    norm,
    norm_params,
    output_weight,
)

POOLS = ("mean", "class")


def patches(x: Tensor, patch: int) -> Tensor:
    """Cut images [B, C, H, W] or series [B, C, T] into [B, tokens, C * patch^d], row by row."""
    batch, channels, *size = x.shape
    tokens = [n // patch for n in size]
    x = x.reshape(batch, channels, *(part for n in tokens for part in (n, patch)))
    if len(size) == 1:
        return x.permute(0, 2, 1, 3).flatten(2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def token_shape(example: tuple[int, ...], patch: int) -> tuple[int, int]:
    """(tokens, numbers in each) of one example [C, H, W] or [C, T].

    Raises:
        ValueError: ``patch`` does not divide the size.
    """
    channels, *size = example
    if patch < 1 or any(n % patch for n in size):
        raise ValueError(f"patch must divide the inputs' size {tuple(size)}, got {patch}")
    return math.prod(n // patch for n in size), channels * patch ** len(size)


@dataclass(eq=False)
class ViT(Classifier):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with pre-norm blocks and learned positions.

    Inputs are images [B, C, H, W] or series [B, C, T].

    Attributes:
        patch: width of a patch; divides the inputs' size.
        width: of the residual stream.
        layers, heads: how many blocks, and attention heads in each.
        mlp_ratio: width of a block's MLP over ``width``.
        activation: of the MLPs; a name in `metaopt_tasks.layers.ACTIVATIONS`.
        norm: ``layer`` or ``rms``.
        pool: what the head sees: the ``mean`` token, or a ``class`` token of its own.
    """

    patch: int = 2
    width: int = 32
    layers: int = 1
    heads: int = 2
    mlp_ratio: int = 2
    activation: str = "gelu"
    norm: str = "layer"
    pool: str = "mean"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("norm", self.norm, NORMS)
        require_choice("pool", self.pool, POOLS)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        token_shape(tuple(self.train.tensors["input"].shape[1:]), self.patch)

    def init(self, generator: Generator) -> Params:
        """LeCun normal matrices (scaled for the activation in front of it, residual branches / sqrt(2 layers), as GPT-2's),
        embeddings of standard deviation 0.02, a small head, zero biases."""
        tokens, numbers = token_shape(tuple(self.train.tensors["input"].shape[1:]), self.patch)
        d, gain, damping = self.width, ACTIVATIONS[self.activation][1], 1 / math.sqrt(2 * self.layers)
        params = {
            "patch.weight": hidden_weight((d, numbers), generator),
            "patch.bias": torch.zeros(d),
            "position.embedding": 0.02 * torch.randn(tokens, d, generator=generator),
        }
        if self.pool == "class":
            params["class.embedding"] = 0.02 * torch.randn(1, d, generator=generator)
        for i in range(1, self.layers + 1):
            params |= block_params(f"block{i}.", d, self.mlp_ratio * d, generator, gain, damping, self.norm)
        return params | norm_params("norm", d, self.norm) | {
            "head.weight": output_weight((self.classes, d), generator),
            "head.bias": torch.zeros(self.classes),
        }  # fmt: skip

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Inputs [B, C, H, W] or [B, C, T] -> logits [B, classes]."""
        act, attend = ACTIVATIONS[self.activation][0], partial(attention, heads=self.heads)
        h = linear(params, "patch", patches(inputs, self.patch)) + params["position.embedding"]
        if self.pool == "class":
            h = torch.cat([params["class.embedding"].expand(len(h), 1, self.width), h], 1)
        for i in range(1, self.layers + 1):
            h = block(params, f"block{i}.", h, attend, act, self.norm)
        h = norm(params, "norm", h, self.norm)
        return linear(params, "head", h[:, 0] if self.pool == "class" else h.mean(1))

    def info(self) -> dict[str, ParamInfo]:
        """The patch map is the input, the head the output; positions and the class token are embeddings."""
        roles = {
            "patch.weight": "input", "position.embedding": "embedding", "class.embedding": "embedding",
            "head.weight": "output",
        }  # fmt: skip
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def vit(
    name: str = "vit",
    data: str = "digits",
    patch: int = 2,
    width: int = 32,
    layers: int = 1,
    heads: int = 2,
    mlp_ratio: int = 2,
    activation: str = "gelu",
    norm: str = "layer",
    pool: str = "mean",
    batch_size: int = 32,
    horizon: int = 500,
    device: Any = "cpu",
) -> ViT:
    """A vision transformer on labelled images [N, C, H, W] or series [N, C, T]; see `ViT` for the arguments."""
    splits = load(data, device)
    return ViT(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes_of(splits),
        patch=patch, width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio, activation=activation, norm=norm,
        pool=pool,
    )  # fmt: skip
