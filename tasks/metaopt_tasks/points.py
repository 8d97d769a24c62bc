"""Classifiers of point clouds that do not care for the order of the points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.choices import require_choice
from metaopt_tasks.classifier import Classifier
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import ACTIVATIONS, hidden_weight, linear, mlp, mlp_params

POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {"mean": lambda h: h.mean(1), "max": lambda h: h.amax(1)}


@dataclass(eq=False)
class DeepSets(Classifier):
    """An MLP of every point, pooled over the points, then an MLP to class logits.

    Zaheer et al. 2017, arXiv:1703.06114; with ``max`` as in PointNet (Qi et al. 2017, arXiv:1612.00593).

    Attributes:
        point_hidden: widths of the MLP of a point, at least one.
        hidden: widths after pooling.
        pool: ``mean`` or ``max``.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: of the hidden weights; a name in `metaopt_tasks.layers.INITIALIZERS`.
    """

    point_hidden: tuple[int, ...] = (32,)
    hidden: tuple[int, ...] = (32,)
    pool: str = "mean"
    activation: str = "relu"
    initializer: str = "normal"

    def __post_init__(self) -> None:
        require_choice("pool", self.pool, POOLS)
        require_choice("activation", self.activation, ACTIVATIONS)
        if not self.point_hidden:
            raise ValueError("point_hidden must have at least one width, got none; a pool of bare points tells little")

    def init(self, generator: Generator) -> Params:
        """Hidden weights by ``initializer``, a small head, zero biases."""
        gain = ACTIVATIONS[self.activation][1]
        params: Params = {}
        width = self.train.tensors["input"].shape[-1]
        for i, new in enumerate(self.point_hidden, start=1):
            params[f"point{i}.weight"] = hidden_weight((new, width), generator, gain, self.initializer)
            params[f"point{i}.bias"] = torch.zeros(new)
            width = new
        return params | mlp_params((width, *self.hidden, self.classes), generator, gain, initializer=self.initializer)

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Clouds [B, points, d] -> logits [B, classes]."""
        act = ACTIVATIONS[self.activation][0]
        h = inputs
        for i in range(1, len(self.point_hidden) + 1):
            h = act(linear(params, f"point{i}", h))
        return mlp(params, POOLS[self.pool](h), act)

    def info(self) -> dict[str, ParamInfo]:
        """The first layer of a point is the input."""
        return infer_info(self.init(Generator().manual_seed(0)), {"point1.weight": "input"})


def point_cloud(
    name: str = "point_cloud",
    data: str = "outline_points2d",
    point_hidden: Sequence[int] = (32,),
    hidden: Sequence[int] = (32,),
    pool: str = "mean",
    activation: str = "relu",
    initializer: str = "normal",
    batch_size: int = 32,
    horizon: int = 500,
    device: Any = "cpu",
) -> DeepSets:
    """A classifier of clouds ``input`` [N, points, d] by ``label`` [N]; see `DeepSets`."""
    splits = load(data, device)
    return DeepSets(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes_of(splits),
        point_hidden=tuple(point_hidden), hidden=tuple(hidden), pool=pool, activation=activation, initializer=initializer,
    )  # fmt: skip
