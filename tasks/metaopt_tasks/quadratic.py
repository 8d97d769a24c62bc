"""Quadratic bowls with a known optimum: the workload on which everything can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split, Task, TaskFamily
from metaopt_tasks.choices import require_choice
from metaopt_tasks.scales import WORST

_NOISE_VECTORS = 4096

SPECTRA = ("log_uniform", "two_scales", "power_law")
"""How eigenvalues lie in [1, condition]; see `eigenvalues`."""

SHAPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "bowl": lambda q: q,
    "log": torch.log1p,
    "root": lambda q: (1 + 2 * q).sqrt() - 1,
}
"""What becomes of q = 0.5 (x - x*)' A (x - x*): itself; log(1 + q), which is not convex; or a bowl with linear sides."""


@dataclass(eq=False)
class Quadratic(Task):
    """f(x) = shape(0.5 (x - x*)' A (x - x*)) + optimal_loss, plus the mean over the batch of noise' (x - x*).

    ``config`` holds ``A`` [dim, dim] and ``x_star`` [dim], float32; ``loss`` takes them from its batch (members of a
    family then stack) and falls back to the task's own. Parameters: ``x`` [dim]. Noise, if any, is in the train split
    only, so valid and test losses are exact.

    Attributes:
        optimal_loss: f(x*).
        scale: what `normalize` divides by.
        shape: a name in `SHAPES`.
    """

    optimal_loss: float = 0.0
    scale: float = 1.0
    shape: str = "bowl"

    def init(self, generator: Generator) -> Params:
        """``x`` from the standard normal distribution."""
        return {"x": torch.randn(self.config["x_star"].shape, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """f(x); ``batch["noise"]`` [batch_size, dim] adds its mean to the gradient and leaves f(x*) as it is."""
        x = params["x"]
        a, x_star = (batch.get(name, self.config[name]).to(x.dtype) for name in ("A", "x_star"))
        offset = x - x_star
        loss = SHAPES[self.shape](0.5 * (offset @ (a @ offset))) + self.optimal_loss
        return loss + batch["noise"].mean(0).to(x.dtype) @ offset if "noise" in batch else loss

    def normalize(self, loss: Tensor) -> Tensor:
        """(loss - optimal_loss) / scale in [-1.5, 1.5]: 0 at the optimum, about 1 at the start; NaN counts as 1.5."""
        return torch.nan_to_num((loss - self.optimal_loss) / self.scale, nan=WORST).clamp(-WORST, WORST)

    def info(self) -> dict[str, ParamInfo]:
        """``x`` is a vector added to a constant: a bias."""
        return infer_info({"x": self.config["x_star"]}, {"x": "bias"})

    def optimum(self) -> Params:
        """The parameters at which the loss is ``optimal_loss``."""
        return {"x": self.config["x_star"].clone()}

    def mean_start(self) -> Tensor:
        """Mean of 0.5 (x - x*)' A (x - x*) over the starts, float64."""
        a, x_star = (self.config[key].double() for key in ("A", "x_star"))
        return 0.5 * (a.trace() + x_star @ a @ x_star)

    def measured(self) -> Self:
        """This task, with ``scale`` its own; members of a family share one, so that they stack."""
        self.scale = float(SHAPES[self.shape](self.mean_start()))
        return self


@dataclass(frozen=True)
class QuadraticFamily(TaskFamily):
    """Random bowls: A = Q diag(eigenvalues) Q', Q a random rotation, x* standard normal.

    Eigenvalues include both 1 and ``condition``, so every member has exactly this condition number. Gradient noise is
    a table of centred normal vectors on the device, one for the whole family, that the unroll samples by index like
    any other data: runs are reproducible, and members still stack.

    Attributes:
        dim: number of parameters, at least 2.
        condition: largest over smallest eigenvalue, at least 1. Float32 numbers in A blur it above 1e5 unless the axes
            are the eigenvectors.
        noise: standard deviation of one example's gradient noise in each coordinate; a batch has 1/sqrt(batch_size) of
            it.
        device: where the members' numbers live.
        batch_size, horizon: see `metaopt.task.Task`.
        optimal_loss: loss of every member at its optimum.
        spectrum: a name in `SPECTRA`.
        rotated: whether Q is random; else it is the identity, and A is diagonal.
        shape: a name in `SHAPES`.
    """

    stacks: ClassVar[bool] = True

    dim: int = 20
    condition: float = 100.0
    noise: float = 0.0
    device: Any = "cpu"
    batch_size: int = 1
    horizon: int = 100
    optimal_loss: float = 0.0
    name: str = "quadratic"
    spectrum: str = "log_uniform"
    rotated: bool = True
    shape: str = "bowl"

    def __post_init__(self) -> None:
        _require_spectrum(self.dim, self.condition, self.spectrum)
        require_choice("shape", self.shape, SHAPES)

    def sample(self, generator: Generator) -> Quadratic:
        """One bowl, from a CPU generator."""
        values = eigenvalues(self.dim, self.condition, generator, self.spectrum)
        config = {
            "A": (rotated(values, generator) if self.rotated else values.diag()).float().to(self.device),
            "x_star": torch.randn(self.dim, generator=generator).to(self.device),
        }
        return Quadratic(
            self.name, self._noise_table, Split(), Split(), self.batch_size, self.horizon, config,
            optimal_loss=self.optimal_loss, scale=self._expected_start(), shape=self.shape,
        )  # fmt: skip

    @cached_property
    def _noise_table(self) -> Split:
        return noise_table((self.dim,), self.noise, self.device)

    def _expected_start(self) -> float:
        """About the mean of loss - optimal_loss at a fresh start: x - x* has variance 2, so q's is the mean trace of A."""
        q = torch.tensor(expected_trace(self.dim, self.condition, self.spectrum), dtype=torch.float64)
        return float(SHAPES[self.shape](q))


def _require_spectrum(dim: int, condition: float, spectrum: str) -> None:
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}; a condition number takes two eigenvalues")
    if condition < 1:
        raise ValueError(f"condition must be at least 1, got {condition}: largest over smallest eigenvalue")
    require_choice("spectrum", spectrum, SPECTRA)


def eigenvalues(dim: int, condition: float, generator: Generator, spectrum: str = "log_uniform") -> Tensor:
    """Float64 [dim] in [1, condition], both ends among them.

    ``log_uniform`` draws them; ``two_scales`` has the first half at 1 and the rest at ``condition``; ``power_law`` falls
    from ``condition`` to 1 as a power of the rank, as those of kernels and of network features do.
    """
    if spectrum == "two_scales":
        return torch.cat([torch.ones(dim // 2), torch.full((dim - dim // 2,), condition)]).double()
    if spectrum == "power_law":
        ranks = torch.arange(1, dim + 1, dtype=torch.float64)
        return condition * ranks ** (-math.log(condition) / math.log(dim))
    span = torch.rand(dim, generator=generator, dtype=torch.float64)
    span[0], span[-1] = 0.0, 1.0
    return condition**span


def expected_trace(dim: int, condition: float, spectrum: str = "log_uniform") -> float:
    """Mean of the sum of `eigenvalues`."""
    if spectrum != "log_uniform":
        return float(eigenvalues(dim, condition, Generator(), spectrum).sum())
    log = math.log(condition)
    return 1 + condition + (dim - 2) * ((condition - 1) / log if log > 0 else 1.0)


def rotation(dim: int, generator: Generator) -> Tensor:
    """A random orthogonal matrix, float64 [dim, dim], uniform over all (Mezzadri 2007, arXiv:math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotated(values: Tensor, generator: Generator) -> Tensor:
    """A symmetric matrix, float64 [dim, dim], with eigenvalues ``values`` and random eigenvectors."""
    q = rotation(len(values), generator)
    a = (q * values) @ q.T
    return (a + a.T) / 2


def noise_table(shape: tuple[int, ...], noise: float, device: Any) -> Split:
    """4,096 normal tensors of mean 0 and standard deviation ``noise`` as ``noise`` [4096, *shape]; empty without noise."""
    if noise == 0:
        return Split()
    table = torch.randn(_NOISE_VECTORS, *shape, generator=Generator().manual_seed(0))
    return Split({"noise": (noise * (table - table.mean(0))).to(device)})


def quadratic(name: str = "quadratic", seed: int = 0, device: Any = "cpu", **arguments: Any) -> Quadratic:
    """The member of a `QuadraticFamily` (which takes ``arguments``) that ``seed`` draws, in units of its own mean start."""
    return QuadraticFamily(name=name, device=device, **arguments).sample(Generator().manual_seed(seed)).measured()


@dataclass(eq=False)
class KroneckerQuadratic(Quadratic):
    """f(W) = shape(0.5 tr(E' A E B)) + optimal_loss with E = W - W*: a bowl whose curvature is the product of A and B.

    A layer's Gauss-Newton matrix is about of this form (Martens and Grosse 2015, arXiv:1503.05671), with B from its
    inputs and A from the gradients of its outputs: rules that keep a matrix per side (Shampoo) can undo it, and rules that
    go by single entries cannot. ``config`` holds ``A`` [out, out], ``B`` [in, in] and ``w_star`` [out, in].
    Parameters: ``weight`` [out, in].
    """

    def init(self, generator: Generator) -> Params:
        """``weight`` from the standard normal distribution."""
        return {"weight": torch.randn(self.config["w_star"].shape, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """f(W); ``batch["noise"]`` [batch_size, out, in] adds its mean to the gradient."""
        weight = params["weight"]
        a, b, w_star = (batch.get(name, self.config[name]).to(weight.dtype) for name in ("A", "B", "w_star"))
        offset = weight - w_star
        loss = SHAPES[self.shape](0.5 * (offset * (a @ offset @ b)).sum()) + self.optimal_loss
        return loss + (batch["noise"].mean(0).to(weight.dtype) * offset).sum() if "noise" in batch else loss

    def info(self) -> dict[str, ParamInfo]:
        """``weight`` is the matrix of a hidden layer."""
        return infer_info({"weight": self.config["w_star"]}, {"weight": "hidden"})

    def optimum(self) -> Params:
        """The parameters at which the loss is ``optimal_loss``."""
        return {"weight": self.config["w_star"].clone()}

    def mean_start(self) -> Tensor:
        """Mean of 0.5 tr(E' A E B) over the starts, float64."""
        a, b, w_star = (self.config[key].double() for key in ("A", "B", "w_star"))
        return 0.5 * (a.trace() * b.trace() + (w_star * (a @ w_star @ b)).sum())


def kronecker_quadratic(
    name: str = "kronecker_quadratic",
    rows: int = 16,
    columns: int = 16,
    condition: float = 1e4,
    spectrum: str = "log_uniform",
    shape: str = "bowl",
    noise: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    horizon: int = 200,
    device: Any = "cpu",
) -> KroneckerQuadratic:
    """A bowl over matrices [rows, columns] whose two sides have condition number sqrt(condition) each.

    See `QuadraticFamily` for the other arguments.
    """
    require_choice("shape", shape, SHAPES)
    side = math.sqrt(condition) if condition >= 1 else condition
    for dim in (rows, columns):
        _require_spectrum(dim, side, spectrum)
    generator = Generator().manual_seed(seed)
    config = {
        key: rotated(eigenvalues(dim, side, generator, spectrum), generator).float().to(device)
        for key, dim in (("A", rows), ("B", columns))
    }
    config["w_star"] = torch.randn(rows, columns, generator=generator).to(device)
    return KroneckerQuadratic(
        name, noise_table((rows, columns), noise, device), Split(), Split(), batch_size, horizon, config, shape=shape
    ).measured()  # fmt: skip
