"""Residual convolutional networks without batch statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.choices import require_choice
from metaopt_tasks.classifier import Classifier
from metaopt_tasks.conv import channel_norm, channel_norm_params, conv, require_channels
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import ACTIVATIONS, hidden_weight, linear, output_weight


@dataclass(eq=False)
class ResNet(Classifier):
    """Pre-activation residual blocks (He et al. 2016, arXiv:1603.05027) on images [B, C, H, W] or series [B, C, T].

    A 3-wide convolution, then stages of blocks; each stage but the first halves the map (rounding up) and doubles the
    channels, in its first block, whose shortcut is a 1-wide convolution. Norm, activation, mean over positions, head.

    Attributes:
        width: channels of the first stage.
        stages: how many.
        blocks: in each stage; a block is twice norm, activation, convolution.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        norm: ``none``, ``layer`` or ``group``; see `metaopt_tasks.conv.channel_norm`.
    """

    width: int = 8
    stages: int = 2
    blocks: int = 1
    activation: str = "relu"
    norm: str = "group"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_channels([self.width], self.norm)
        if min(self.stages, self.blocks) < 1:
            raise ValueError(f"stages and blocks must be at least 1, got {self.stages} and {self.blocks}")

    def _plan(self) -> list[tuple[str, int, int, int]]:
        """(name, channels in, channels out, stride) of every block."""
        plan = []
        for stage in range(self.stages):
            for block in range(self.blocks):
                first = block == 0 and stage > 0
                out = self.width * 2**stage
                plan.append((f"stage{stage + 1}.block{block + 1}.", out // 2 if first else out, out, 2 if first else 1))
        return plan

    def init(self, generator: Generator) -> Params:
        """Normal kernels, scaled for the activation; the last of a block is divided by sqrt(blocks), so that the
        residual stream starts at one size whatever the depth. Small head, zero biases."""
        depth, *size = self.train.tensors["input"].shape[1:]
        gain, plan = ACTIVATIONS[self.activation][1], self._plan()
        damping = 1 / math.sqrt(len(plan))

        def kernel(out: int, inputs: int, width: int, scale: float) -> Tensor:
            return hidden_weight((out, inputs, *[width] * len(size)), generator, scale)

        params = {"stem.weight": kernel(self.width, depth, 3, 1.0), "stem.bias": torch.zeros(self.width)}
        for name, old, new, stride in plan:
            params |= channel_norm_params(f"{name}norm1", old, self.norm)
            params |= {f"{name}conv1.weight": kernel(new, old, 3, gain), f"{name}conv1.bias": torch.zeros(new)}
            params |= channel_norm_params(f"{name}norm2", new, self.norm)
            params |= {
                f"{name}conv2.weight": kernel(new, new, 3, gain * damping),
                f"{name}conv2.bias": torch.zeros(new),
            }
            if stride > 1:
                params[f"{name}shortcut.weight"] = kernel(new, old, 1, 1.0)
        last = plan[-1][2]
        params |= channel_norm_params("norm", last, self.norm)
        return params | {
            "head.weight": output_weight((self.classes, last), generator),
            "head.bias": torch.zeros(self.classes),
        }

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Inputs [B, C, H, W] or [B, C, T] -> logits [B, classes]."""
        act = ACTIVATIONS[self.activation][0]
        h = conv(params, "stem", inputs)
        for name, _, _, stride in self._plan():
            inner = conv(params, f"{name}conv1", act(channel_norm(params, f"{name}norm1", h, self.norm)), stride)
            inner = conv(params, f"{name}conv2", act(channel_norm(params, f"{name}norm2", inner, self.norm)))
            h = inner + (conv(params, f"{name}shortcut", h, stride) if stride > 1 else h)
        h = act(channel_norm(params, "norm", h, self.norm))
        return linear(params, "head", h.flatten(2).mean(2))

    def info(self) -> dict[str, ParamInfo]:
        """The stem is the input, the head the output, all other kernels are hidden."""
        return infer_info(self.init(Generator().manual_seed(0)), {"stem.weight": "input", "head.weight": "output"})


def resnet(
    name: str = "resnet",
    data: str = "digits",
    width: int = 8,
    stages: int = 2,
    blocks: int = 1,
    activation: str = "relu",
    norm: str = "group",
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> ResNet:
    """A residual network on labelled images [N, C, H, W] or series [N, C, T]; see `ResNet` for the arguments."""
    splits = load(data, device)
    return ResNet(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes_of(splits),
        width=width, stages=stages, blocks=blocks, activation=activation, norm=norm,
    )  # fmt: skip
