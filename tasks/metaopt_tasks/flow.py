"""Normalising flows: density estimation with an exact likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.densities import density_entropy
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

COUPLINGS = ("affine", "additive")
_LOG_SCALE_BOUND = 1.0  # of one layer; with more, stray points can blow up the loss


@dataclass(eq=False)
class Flow(ScaledTask):
    """Coupling layers that turn ``input`` [B, d] into standard normal noise; the loss is -log p(input) in nats.

    A layer keeps the first d // 2 coordinates a, maps the others to b * exp(s(a)) + t(a), and swaps the two groups:
    ``affine`` is RealNVP (Dinh et al. 2017, arXiv:1605.08803), ``additive`` with s = 0 is NICE (arXiv:1410.8516). A
    scale per coordinate comes last. The determinant of the Jacobian is exact: exp of the sum of all log-scales.

    Attributes:
        layers: how many couplings.
        hidden: widths of the network s, t of each.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: of the hidden weights; a name in `metaopt_tasks.layers.INITIALIZERS`.
        coupling: ``affine`` or ``additive``.
    """

    layers: int = 4
    hidden: tuple[int, ...] = (16,)
    activation: str = "tanh"
    initializer: str = "normal"
    coupling: str = "affine"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("coupling", self.coupling, COUPLINGS)
        self._dim = self.train.tensors["input"].shape[1]
        if self._dim < 2:
            raise ValueError(f"a coupling needs at least 2 coordinates, got {self._dim}; use other data")

    def init(self, generator: Generator) -> Params:
        """Zero heads and unit scales: a permutation of the coordinates, so the first density is a standard normal one."""
        kept = self._dim // 2
        outputs = (self._dim - kept) * (2 if self.coupling == "affine" else 1)
        widths, gain = (kept, *self.hidden, outputs), ACTIVATIONS[self.activation][1]
        params: Params = {}
        for i in range(self.layers):
            params |= mlp_params(widths, generator, gain, f"coupling{i}.", self.initializer)
            params[f"coupling{i}.head.weight"] = torch.zeros(outputs, widths[-2])
        return params | {"log_scale.weight": torch.zeros(self._dim)}

    def encode(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        """Points [B, d] -> their noise [B, d], and log |det of the Jacobian| [B]."""
        kept, activation = self._dim // 2, ACTIVATIONS[self.activation][0]
        log_det = params["log_scale.weight"].sum().expand(len(x))
        for i in range(self.layers):
            a, b = x[:, :kept], x[:, kept:]
            shift = mlp(params, a, activation, f"coupling{i}.")
            if self.coupling == "affine":
                raw, shift = shift.chunk(2, -1)
                log_scale = _LOG_SCALE_BOUND * torch.tanh(raw / _LOG_SCALE_BOUND)
                b = b * log_scale.exp()
                log_det = log_det + log_scale.sum(-1)
            x = torch.cat([b + shift, a], -1)
        return x * params["log_scale.weight"].exp(), log_det

    def info(self) -> dict[str, ParamInfo]:
        """The first layer of every coupling's network is an input."""
        params = self.init(Generator().manual_seed(0))
        return infer_info(params, {name: "input" for name in params if name.endswith("fc1.weight")})

    def log_prob(self, params: Params, x: Tensor) -> Tensor:
        """Log-density [B] in nats at points [B, d]: that of their noise plus the log-determinant."""
        noise, log_det = self.encode(params, x)
        return log_det - 0.5 * (noise.square().sum(-1) + self._dim * math.log(2 * math.pi))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean -log p of ``input`` [B, d]."""
        return -self.log_prob(params, batch["input"]).mean()


def flow(
    name: str = "flow",
    data: str = "moons2d",
    layers: int = 4,
    hidden: Sequence[int] = (16,),
    activation: str = "tanh",
    initializer: str = "normal",
    coupling: str = "affine",
    batch_size: int = 128,
    horizon: int = 500,
    device: Any = "cpu",
) -> Flow:
    """A flow on a source of standardised points ``input`` [N, d]; see `Flow`.

    Normalised losses are 0 at the entropy of the data (as `metaopt_tasks.data.densities.entropy` estimates it) and 1 for the
    standard normal distribution.
    """
    splits = load(data, device)
    dim = splits["train"].tensors["input"].shape[1]
    floor = density_entropy(data)
    gaussian = dim / 2 * (1 + math.log(2 * math.pi))
    return Flow(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, floor=floor, scale=gaussian - floor,
        layers=layers, hidden=tuple(hidden), activation=activation, initializer=initializer, coupling=coupling,
    )  # fmt: skip
