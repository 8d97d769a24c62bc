"""Quadratic bowls with a known optimum: the workload on which everything can be checked by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split, Task, TaskFamily

_NOISE_VECTORS = 4096


@dataclass(eq=False)
class Quadratic(Task):
    """f(x) = 0.5 (x - x*)' A (x - x*) + optimal_loss, plus the mean over the batch of noise' (x - x*).

    ``config`` holds ``A`` [dim, dim] and ``x_star`` [dim], float32; ``loss`` takes them from its batch (members of a
    family then stack) and falls back to the task's own. Parameters: ``x`` [dim]. Noise, if any, is in the train split
    only, so valid and test losses are exact.

    Attributes:
        optimal_loss: f(x*).
        scale: what `normalize` divides by.
    """

    optimal_loss: float = 0.0
    scale: float = 1.0

    def init(self, generator: Generator) -> Params:
        """``x`` from the standard normal distribution."""
        return {"x": torch.randn(self.config["x_star"].shape, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """f(x); ``batch["noise"]`` [batch_size, dim] adds its mean to the gradient and leaves f(x*) as it is."""
        values = {**self.config, **batch}
        offset = params["x"] - values["x_star"]
        loss = 0.5 * (offset @ (values["A"] @ offset)) + self.optimal_loss
        return loss + values["noise"].mean(0) @ offset if "noise" in values else loss

    def normalize(self, loss: Tensor) -> Tensor:
        """(loss - optimal_loss) / scale in [-1.5, 1.5]: 0 at the optimum, about 1 at the start; NaN counts as 1.5."""
        return torch.nan_to_num((loss - self.optimal_loss) / self.scale, nan=1.5).clamp(-1.5, 1.5)

    def info(self) -> dict[str, ParamInfo]:
        """``x`` is a vector added to a constant: a bias."""
        return infer_info({"x": self.config["x_star"]}, {"x": "bias"})

    def optimum(self) -> Params:
        """The parameters at which the loss is ``optimal_loss``."""
        return {"x": self.config["x_star"].clone()}


@dataclass(frozen=True)
class QuadraticFamily(TaskFamily):
    """Random bowls: A = Q diag(eigenvalues) Q', Q a random rotation, x* standard normal.

    Eigenvalues are log-uniform in [1, condition] and include both ends, so every member has exactly this condition
    number. Gradient noise is a table of centred normal vectors on the device, one for the whole family, that the
    unroll samples by index like any other data: runs are reproducible, and members still stack.

    Attributes:
        dim: number of parameters, at least 2.
        condition: largest over smallest eigenvalue, at least 1.
        noise: standard deviation of one example's gradient noise in each coordinate; a batch has 1/sqrt(batch_size) of
            it.
        device: where the members' numbers live.
        batch_size, horizon: see `metaopt.task.Task`.
        optimal_loss: loss of every member at its optimum.
    """

    dim: int = 20
    condition: float = 100.0
    noise: float = 0.0
    device: Any = "cpu"
    batch_size: int = 1
    horizon: int = 100
    optimal_loss: float = 0.0
    name: str = "quadratic"

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2, got {self.dim}; a condition number takes two eigenvalues")
        if self.condition < 1:
            raise ValueError(f"condition must be at least 1, got {self.condition}: largest over smallest eigenvalue")

    def sample(self, generator: Generator) -> Quadratic:
        """One bowl, from a CPU generator."""
        span = torch.rand(self.dim, generator=generator, dtype=torch.float64)
        span[0], span[-1] = 0.0, 1.0
        eigenvalues = self.condition**span
        gaussian = torch.randn(self.dim, self.dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        q = q * r.diagonal().sign()  # makes Q uniform over rotations (Mezzadri 2007, arXiv:math-ph/0609050)
        a = (q * eigenvalues) @ q.T
        config = {
            "A": ((a + a.T) / 2).float().to(self.device),
            "x_star": torch.randn(self.dim, generator=generator).to(self.device),
        }
        return Quadratic(
            self.name, self._noise_table, Split(), Split(), self.batch_size, self.horizon, config,
            optimal_loss=self.optimal_loss, scale=self._expected_start(),
        )  # fmt: skip

    @cached_property
    def _noise_table(self) -> Split:
        if self.noise == 0:
            return Split()
        table = torch.randn(_NOISE_VECTORS, self.dim, generator=Generator().manual_seed(0))
        return Split({"noise": (self.noise * (table - table.mean(0))).to(self.device)})

    def _expected_start(self) -> float:
        """Mean of loss - optimal_loss at a fresh start: x - x* has variance 2, so it is the mean trace of A."""
        log = math.log(self.condition)
        mean = (self.condition - 1) / log if log > 0 else 1.0
        return 1 + self.condition + (self.dim - 2) * mean
