"""Learning a matrix by its factors: factorisation, completion and sensing, non-convex problems with known optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.layers import hidden_weight
from metaopt_tasks.quadratic import rotation
from metaopt_tasks.scales import ScaledTask


@dataclass(eq=False)
class MatrixFactorization(ScaledTask):
    """Mean squared error of a product of ``depth`` matrices to ``target`` [rows, columns]: a deep linear network.

    Saxe, McClelland and Ganguli 2014, arXiv:1312.6120. ``config`` holds ``target``; no data. Parameters:
    ``factor1.weight`` [inner, columns], [inner, inner] in between, and last [rows, inner]. With ``inner`` below the
    target's rank, ``floor`` is the error of the best matrix of rank ``inner`` (Eckart and Young 1936).

    Attributes:
        inner: width of the factors.
        depth: number of factors, at least 2.
        init_scale: times LeCun's initial weights; small ones start near a saddle.
    """

    inner: int = 4
    depth: int = 2
    init_scale: float = 1.0

    def init(self, generator: Generator) -> Params:
        """Normal factors of standard deviation init_scale / sqrt(fan_in)."""
        rows, columns = self.config["target"].shape
        widths = [columns, *[self.inner] * (self.depth - 1), rows]
        return {
            f"factor{i}.weight": hidden_weight((widths[i], widths[i - 1]), generator, self.init_scale)
            for i in range(1, self.depth + 1)
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean squared error over the entries."""
        product = params["factor1.weight"]
        for i in range(2, self.depth + 1):
            product = params[f"factor{i}.weight"] @ product
        return (product - batch.get("target", self.config["target"])).square().mean()

    def info(self) -> dict[str, ParamInfo]:
        """The factor next to the input is the first."""
        roles = {"factor1.weight": "input", f"factor{self.depth}.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def low_rank(rows: int, columns: int, rank: int, condition: float, noise: float, generator: Generator) -> Tensor:
    """A float64 matrix [rows, columns] of this rank with mean square 1, plus normal noise in every entry.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        rank: of the noise-free matrix.
        condition: largest over smallest of its singular values, which are log-spaced.
        noise: standard deviation.
        generator: of all random numbers.
    """
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank must be in [1, {min(rows, columns)}] for a {rows} x {columns} matrix, got {rank}")
    if condition < 1:
        raise ValueError(f"condition must be at least 1, got {condition}: largest over smallest singular value")
    left, right = rotation(rows, generator)[:, :rank], rotation(columns, generator)[:, :rank]
    values = condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)
    matrix = (left * (values * math.sqrt(rows * columns) / values.norm())) @ right.T
    return matrix + noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def matrix_factorization(
    name: str = "matrix_factorization",
    rows: int = 20,
    columns: int = 20,
    rank: int = 4,
    inner: int = 4,
    depth: int = 2,
    condition: float = 1.0,
    noise: float = 0.0,
    init_scale: float = 1.0,
    seed: int = 0,
    horizon: int = 200,
    device: Any = "cpu",
) -> MatrixFactorization:
    """Factor a matrix drawn by ``seed``; see `low_rank` for the target and `MatrixFactorization` for the factors."""
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}; one factor is the matrix itself")
    target = low_rank(rows, columns, rank, condition, noise, Generator().manual_seed(seed)).float()
    squares = torch.linalg.svdvals(target.double()).square() / target.numel()
    floor, none = float(squares[inner:].sum()) if noise or inner < rank else 0.0, Split()
    return MatrixFactorization(
        name, none, none, none, 1, horizon, {"target": target}, floor=floor, scale=float(squares.sum()) - floor,
        inner=inner, depth=depth, init_scale=init_scale,
    ).to(device)  # fmt: skip


@dataclass(eq=False)
class MatrixCompletion(ScaledTask):
    """Fill in a matrix of low rank from some of its entries: mean squared error of ``value`` [B] at ``row``, ``column`` [B].

    Parameters: ``row.embedding`` [rows, inner] and ``column.embedding`` [columns, inner]; an entry's prediction is the
    product of its two vectors. The valid and test splits are other entries (Candes and Recht 2009, arXiv:0805.4471).

    Attributes:
        rows, columns: of the matrix.
        inner: length of the vectors.
    """

    rows: int = 50
    columns: int = 40
    inner: int = 3

    def init(self, generator: Generator) -> Params:
        """Normal vectors whose products have variance 1 / inner."""
        return {
            "row.embedding": torch.randn(self.rows, self.inner, generator=generator) / math.sqrt(self.inner),
            "column.embedding": torch.randn(self.columns, self.inner, generator=generator) / math.sqrt(self.inner),
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean squared error over the batch's entries."""
        predicted = (params["row.embedding"][batch["row"]] * params["column.embedding"][batch["column"]]).sum(-1)
        return (predicted - batch["value"]).square().mean()

    def info(self) -> dict[str, ParamInfo]:
        """Both are tables of vectors."""
        return infer_info(
            self.init(Generator().manual_seed(0)), dict.fromkeys(["row.embedding", "column.embedding"], "embedding")
        )


def matrix_completion(
    name: str = "matrix_completion",
    rows: int = 50,
    columns: int = 40,
    rank: int = 3,
    inner: int = 3,
    condition: float = 1.0,
    noise: float = 0.0,
    observed: float = 0.5,
    batch_size: int = 128,
    seed: int = 0,
    horizon: int = 200,
    device: Any = "cpu",
) -> MatrixCompletion:
    """Complete a matrix drawn by ``seed`` from a share ``observed`` in (0, 0.9] of its entries; see `low_rank`.

    Half of the others are the valid split and the rest the test split. Noise is in the train split only.
    """
    if not 0 < observed <= 0.9:
        raise ValueError(f"observed must be in (0, 0.9], got {observed}; the other entries judge")
    generator = Generator().manual_seed(seed)
    matrix = low_rank(rows, columns, rank, condition, 0.0, generator).flatten()
    order = torch.randperm(rows * columns, generator=generator)
    seen = round(observed * len(order))
    cuts = order.tensor_split([seen, (seen + len(order)) // 2])
    values = [matrix[part] for part in cuts]
    values[0] = values[0] + noise * torch.randn(seen, generator=generator, dtype=torch.float64)
    train, valid, test = (
        Split({"row": part // columns, "column": part % columns, "value": value.float()})
        for part, value in zip(cuts, values, strict=True)
    )
    return MatrixCompletion(
        name, train, valid, test, batch_size, horizon, scale=float(matrix.square().mean()),
        rows=rows, columns=columns, inner=inner,
    ).to(device)  # fmt: skip


MEASUREMENTS = ("dense", "rank_one", "bilinear")


@dataclass(eq=False)
class MatrixSensing(ScaledTask):
    """Find a matrix of low rank from linear measurements of it: mean squared error of ``target`` [B].

    - ``dense``: <A, F F'> with normal A, as ``input`` [B, dim, dim] (Recht, Fazel and Parrilo 2010, arXiv:0706.4138).
    - ``rank_one``: a' F F' a with ``input`` a [B, dim]; with one column, real phase retrieval (Candes, Li and
      Soltanolkotabi 2015, arXiv:1407.1065).
    - ``bilinear``: a' L R' b with ``input`` [a, b] as [B, 2, dim].

    Parameters: ``factor.weight`` [dim, inner], or ``left.weight`` and ``right.weight``. With ``inner`` above the rank and a
    small start, gradient descent still finds the low-rank matrix (Li, Ma and Zhang 2018, arXiv:1712.09203).

    Attributes:
        measurement: a name in `MEASUREMENTS`.
        inner: columns of the factors.
        init_scale: standard deviation of the initial factors times sqrt(dim inner); the truth has 1.
        truth: factors [dim, rank] at which the loss is 0, float64 by parameter name; on the CPU, wherever the data are, as
            training takes only the names and dim from it.
    """

    measurement: str = "dense"
    inner: int = 2
    init_scale: float = 0.5
    truth: Mapping[str, Tensor] = field(default_factory=dict)

    def init(self, generator: Generator) -> Params:
        """Normal factors."""
        shapes = {name: (len(factor), self.inner) for name, factor in self.truth.items()}
        return {
            name: torch.randn(shape, generator=generator) * (self.init_scale / math.sqrt(math.prod(shape)))
            for name, shape in shapes.items()
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean squared error over the batch's measurements."""
        return (measured(self.measurement, params, batch["input"]) - batch["target"]).square().mean()

    def info(self) -> dict[str, ParamInfo]:
        """Factors are hidden layers, except that the two of a bilinear form each meet an input."""
        role = "input" if self.measurement == "bilinear" else "hidden"
        params = self.init(Generator().manual_seed(0))
        return infer_info(params, dict.fromkeys(params, role))


def measured(measurement: str, factors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Measurements [B] of the matrix with these factors; see `MatrixSensing` for the inputs."""
    if measurement == "bilinear":
        return ((inputs[:, 0] @ factors["left.weight"]) * (inputs[:, 1] @ factors["right.weight"])).sum(1)
    factor = factors["factor.weight"]
    if measurement == "rank_one":
        return (inputs @ factor).square().sum(1)
    return ((inputs @ factor) * factor).sum((1, 2))


def matrix_sensing(
    name: str = "matrix_sensing",
    measurement: str = "dense",
    dim: int = 16,
    rank: int = 2,
    inner: int = 2,
    measurements: int = 400,
    init_scale: float = 0.5,
    batch_size: int = 32,
    seed: int = 0,
    horizon: int = 200,
    device: Any = "cpu",
) -> MatrixSensing:
    """Sense a random ``dim`` x ``dim`` matrix of this rank by ``measurements`` of the train split, and half as many to judge.

    The measurements have no noise, so with ``inner`` of at least ``rank`` the lowest loss is 0.
    """
    require_choice("measurement", measurement, MEASUREMENTS)
    if not 1 <= rank <= inner:
        raise ValueError(
            f"inner must be at least rank = {rank} (itself at least 1), got {inner}; else 0 cannot be reached"
        )
    generator = Generator().manual_seed(seed)
    names = ("left.weight", "right.weight") if measurement == "bilinear" else ("factor.weight",)
    truth = {
        key: torch.randn(dim, rank, generator=generator, dtype=torch.float64) / math.sqrt(dim * rank) for key in names
    }
    shape = {"dense": (dim, dim), "rank_one": (dim,), "bilinear": (2, dim)}[measurement]

    def split(count: int) -> Split:
        inputs = torch.randn(count, *shape, generator=generator, dtype=torch.float64).float()
        return Split({"input": inputs, "target": measured(measurement, truth, inputs.double()).float()})

    train, valid, test = (split(count) for count in (measurements, measurements // 2, measurements // 2))
    return MatrixSensing(
        name, train, valid, test, batch_size, horizon, scale=float(train.tensors["target"].square().mean()),
        measurement=measurement, inner=inner, init_scale=init_scale, truth=truth,
    ).to(device)  # fmt: skip
