"""What a task says of its training loss, where that is a plain dense network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from metaopt.rule import Params

ACTIVATIONS = ("relu", "gelu", "silu", "elu", "softplus", "tanh", "sin", "linear")
"""As torch's functions of these names with their defaults; gelu is the exact one."""

LOSSES = ("cross_entropy", "squared_error", "hinge", "mse")
"""Means over the batch: cross-entropy of logits; squared distance to centred one-hot labels (summed over classes);
``torch.nn.functional.multi_margin_loss``; ``torch.nn.functional.mse_loss``."""


@dataclass(frozen=True)
class DenseNetwork:
    """flattened inputs -> linear layers with an activation between them -> mean loss.

    Attributes:
        layers: names of each layer's weight [out, in] and bias [out], from first to last.
        activation: a name in `ACTIVATIONS`, or one for each layer but the last.
        loss: a name in `LOSSES`.
        label_smoothing: of the cross-entropy, in [0, 1).
        inputs, target: names of the tensors of a split: [N, ...], and [N] int64 classes or, for ``mse``, [N, ...].

    Raises:
        ValueError: an activation or a loss that is none, no layer, another number of activations, or a smoothing that the loss
            has not.
    """

    layers: tuple[tuple[str, str], ...]
    activation: str | tuple[str, ...]
    loss: str
    label_smoothing: float = 0.0
    inputs: str = "input"
    target: str = "label"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must name at least one weight and bias, got none")
        given = (self.activation,) if isinstance(self.activation, str) else self.activation
        for name, value, allowed in (*(("activation", one, ACTIVATIONS) for one in given), ("loss", self.loss, LOSSES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if len(self.activations) != len(self.layers) - 1:
            raise ValueError(
                f"activation must be one name, or {len(self.layers) - 1} for {len(self.layers)} layers, got {len(given)}"
            )
        if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and self.loss != "cross_entropy"):
            raise ValueError(
                f"label_smoothing must be in [0, 1), and 0 unless loss is cross_entropy, got {self.label_smoothing}"
            )

    @property
    def activations(self) -> tuple[str, ...]:
        """Of each layer but the last."""
        return (self.activation,) * (len(self.layers) - 1) if isinstance(self.activation, str) else self.activation

    def examples(self, tensors: Mapping[str, Tensor], leading: int) -> tuple[Tensor, Tensor]:
        """Inputs and target of a split or batch with so many leading dimensions; what comes after them is flattened."""
        inputs, target = tensors[self.inputs].flatten(leading), tensors[self.target]
        return inputs, target.flatten(leading) if self.loss == "mse" else target

    def widths(self, params: Params, inputs: Tensor, target: Tensor) -> tuple[int, ...] | None:
        """The widths from inputs to outputs, if these tensors are this network's; else None, for torch to find out why.

        Args:
            params: [K, *shape] each, those of the layers and no others.
            inputs: [..., D].
            target: int64 [...], or for ``mse`` [..., outputs]; floating-point tensors must be of one dtype.
        """
        names = [name for layer in self.layers for name in layer]
        if {*names} != {*params} or any(p.dim() < 2 for p in params.values()):
            return None
        copies = len(params[names[0]])
        widths = (inputs.shape[-1], *(params[weight].shape[1] for weight, _ in self.layers))
        for (weight, bias), (into, out) in zip(self.layers, pairwise(widths), strict=True):
            if params[weight].shape != (copies, out, into) or params[bias].shape != (copies, out):
                return None
        outputs = (widths[-1],) if self.loss == "mse" else ()
        wanted = inputs.dtype if outputs else torch.int64
        floats = {inputs.dtype, *(p.dtype for p in params.values())}
        if target.shape != (*inputs.shape[:-1], *outputs) or target.dtype != wanted or len(floats) > 1:
            return None
        return widths
