"""Handwritten digits, 8x8 pixels, from scikit-learn (no download): an MLP and a small convolutional network.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (its test
part, as shipped with scikit-learn), CC BY 4.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split, hash64
from metaopt_tasks.cross_entropy import CrossEntropyTask, hidden_weight, output_weight

_SPLIT_SEED = 0
_TRAIN_SHARE, _VALID_SHARE = 0.70, 0.15

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, math.sqrt(2)),
    "gelu": (F.gelu, math.sqrt(2)),
    "silu": (F.silu, math.sqrt(2)),
    "tanh": (torch.tanh, 1.0),
}
"""Name -> (function, gain of the weights before it)."""


def digits(device: Any = "cpu") -> dict[str, Split]:
    """The 1797 images as splits of ``image`` [N, 64] float32 and ``label`` [N] int64.

    Stratified: of each class's images, in the order of a fixed hash of their row numbers, the first 70 % are train, the
    next 15 % valid, the rest test (1258, 270, 269). Pixels are shifted and scaled by the mean and standard deviation of
    all train pixels.
    """
    return {name: split.to(device) for name, split in _digits_on_cpu().items()}


@cache
def _digits_on_cpu() -> dict[str, Split]:
    from sklearn.datasets import load_digits  # takes a second to import; tasks without it should not wait

    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)
    order = hash64(torch.arange(len(labels)) + _SPLIT_SEED).argsort()
    rows: dict[str, list[Tensor]] = {"train": [], "valid": [], "test": []}
    for label in range(10):
        members = order[labels[order] == label]
        ends = [round(_TRAIN_SHARE * len(members)), round((_TRAIN_SHARE + _VALID_SHARE) * len(members))]
        for part, piece in zip(rows.values(), members.tensor_split(ends), strict=True):
            part.append(piece)
    taken = {name: torch.cat(pieces) for name, pieces in rows.items()}
    train = images[taken["train"]]
    images = (images - train.mean()) / train.std()
    return {name: Split({"image": images[index], "label": labels[index]}) for name, index in taken.items()}


@dataclass(eq=False)
class DigitsMLP(CrossEntropyTask):
    """64 -> hidden -> 10 with one nonlinearity; parameters are laid out as by ``nn.Linear``.

    Attributes:
        hidden: width.
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.
    """

    hidden: int = 32
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}")

    def init(self, generator: Generator) -> Params:
        """He (or LeCun, for tanh) normal weights, small head, zero biases."""
        gain = _ACTIVATIONS[self.activation][1]
        return {
            "fc1.weight": hidden_weight((self.hidden, 64), generator, gain),
            "fc1.bias": torch.zeros(self.hidden),
            "fc2.weight": output_weight((self.classes, self.hidden), generator),
            "fc2.bias": torch.zeros(self.classes),
        }

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """Images [..., 64] -> logits [..., 10]."""
        act = _ACTIVATIONS[self.activation][0]
        h = act(F.linear(images, params["fc1.weight"], params["fc1.bias"]))
        return F.linear(h, params["fc2.weight"], params["fc2.bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of ``image`` [B, 64] and ``label`` [B]."""
        return F.cross_entropy(self.logits(params, batch["image"]), batch["label"])

    def info(self) -> dict[str, ParamInfo]:
        """The first layer is the input, the second the output."""
        return infer_info(self.init(Generator().manual_seed(0)), {"fc1.weight": "input", "fc2.weight": "output"})


@dataclass(eq=False)
class DigitsConv(CrossEntropyTask):
    """Two 3x3 convolutions of stride 2 with ReLU (8x8 -> 4x4 -> 2x2) and a linear head on the flattened map.

    Attributes:
        channels: of the two convolutions.
    """

    channels: tuple[int, int] = (8, 16)

    def init(self, generator: Generator) -> Params:
        """He normal kernels, small head, zero biases."""
        c1, c2 = self.channels
        gain = math.sqrt(2)
        return {
            "conv1.weight": hidden_weight((c1, 1, 3, 3), generator, gain),
            "conv1.bias": torch.zeros(c1),
            "conv2.weight": hidden_weight((c2, c1, 3, 3), generator, gain),
            "conv2.bias": torch.zeros(c2),
            "head.weight": output_weight((self.classes, c2 * 4), generator),
            "head.bias": torch.zeros(self.classes),
        }

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """Images [B, 64] -> logits [B, 10]."""
        h = images.reshape(-1, 1, 8, 8)
        h = torch.relu(F.conv2d(h, params["conv1.weight"], params["conv1.bias"], stride=2, padding=1))
        h = torch.relu(F.conv2d(h, params["conv2.weight"], params["conv2.bias"], stride=2, padding=1))
        return F.linear(h.flatten(1), params["head.weight"], params["head.bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of ``image`` [B, 64] and ``label`` [B]."""
        return F.cross_entropy(self.logits(params, batch["image"]), batch["label"])

    def info(self) -> dict[str, ParamInfo]:
        """The first convolution is the input, the second hidden, the head the output."""
        roles = {"conv1.weight": "input", "conv2.weight": "hidden", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def digits_mlp(
    hidden: int = 32, batch_size: int = 64, horizon: int = 200, device: Any = "cpu", activation: str = "relu"
) -> DigitsMLP:
    """Classify digits with a 64-hidden-10 MLP; reaches 90 % test accuracy within a hundred AdamW steps."""
    data = digits(device)
    return DigitsMLP(
        "digits_mlp", data["train"], data["valid"], data["test"], batch_size, horizon,
        hidden=hidden, activation=activation,
    )  # fmt: skip


def digits_conv(
    device: Any = "cpu", channels: tuple[int, int] = (8, 16), batch_size: int = 64, horizon: int = 200
) -> DigitsConv:
    """Classify digits with a small convolutional network of 1.9k parameters."""
    data = digits(device)
    return DigitsConv("digits_conv", data["train"], data["valid"], data["test"], batch_size, horizon, channels=channels)
