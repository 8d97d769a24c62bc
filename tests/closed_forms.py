"""Bilevel problems whose hypergradient has a formula: the audit of every method.

Each problem has an inner loss of condition number about 3, so that 50 steps of SGD reach its optimum to rounding in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.rule import Params
from metaopt.tune import Hypers, Inner
from metaopt.tune.hypergradient import Outer
from metaopt_classic.sgd import SGD

STEPS = 50


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        hypers: where the hypergradient is taken.
        optimum: the inner optimum there, as one vector.
        hessian: of the inner loss there.
        right: d outer/dw there.
        mixed: d^2 g / dl dw there, [hypers, w], of the hypers as one vector.
        direct: d outer/dl there.
    """

    loss: Callable[[Params, Hypers, object], Tensor]
    outer: Outer
    params: Params
    hypers: Hypers
    optimum: Tensor
    hessian: Tensor
    right: Tensor
    mixed: Tensor
    direct: Tensor

    @property
    def exact(self) -> Tensor:
        """The hypergradient at the optimum, by the implicit function theorem in matrices."""
        return self.direct - self.mixed @ torch.linalg.solve(self.hessian, self.right)

    @property
    def rate(self) -> float:
        """The best learning rate of gradient descent."""
        eigenvalues = torch.linalg.eigvalsh(self.hessian)
        return float(2 / (eigenvalues[0] + eigenvalues[-1]))

    def inner(self, steps: int = STEPS) -> Inner:
        return Inner.of_rule(self.loss, SGD(lr=self.rate), self.params, steps)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _vector(params: Params) -> Tensor:
    return torch.cat([params["a"], params["b"]])


def _start(size: int) -> Params:
    """Two tensors: a solver that forgets how they are coupled is found out."""
    half = size // 2
    return {"a": draws(half, seed=8), "b": draws(size - half, seed=9)}


def ridge() -> Problem:
    """A log-penalty per coordinate: dl_i = -exp(l_i) w_i (H^-1 grad f)_i."""
    x, y, xv, yv = draws(60, 8, seed=1), draws(60, seed=2), draws(20, 8, seed=3), draws(20, seed=4)
    logs = torch.linspace(-1, 0.5, 8, dtype=torch.float64)
    hessian = x.mT @ x / 60 + torch.diag(logs.exp())
    w = torch.linalg.solve(hessian, x.mT @ y / 60)
    return Problem(
        lambda p, h, _: ((x @ _vector(p) - y) ** 2).mean() / 2 + (h["l"].exp() * _vector(p) ** 2).sum() / 2,
        lambda p, h: ((xv @ _vector(p) - yv) ** 2).mean() / 2,
        _start(8), {"l": logs}, w, hessian, xv.mT @ (xv @ w - yv) / 20, torch.diag(logs.exp() * w), torch.zeros_like(logs),
    )  # fmt: skip


def quadratic() -> Problem:
    """g = w'Aw/2 - w'(b + Bl), f = |w - c|^2/2 + r |l|^2/2: dl = B'A^-1 (w* - c) + r l."""
    root, b, c = draws(6, 6, seed=1), draws(6, seed=2), draws(6, seed=3)
    coupling, r = draws(6, 4, seed=4), 0.3
    matrix = torch.eye(6, dtype=torch.float64) + root @ root.mT / 12
    levels = draws(4, seed=5)
    w = torch.linalg.solve(matrix, b + coupling @ levels)
    return Problem(
        lambda p, h, _: _vector(p) @ matrix @ _vector(p) / 2 - _vector(p) @ (b + coupling @ h["l"]),
        lambda p, h: ((_vector(p) - c) ** 2).sum() / 2 + r * (h["l"] ** 2).sum() / 2,
        _start(6), {"l": levels}, w, matrix, w - c, -coupling.mT, r * levels,
    )  # fmt: skip


def weighted_least_squares() -> Problem:
    """Weights of samples: dw*/ds_i = H^-1 x_i (y_i - x_i'w*)."""
    x, y, c = draws(40, 4, seed=1), draws(40, seed=2), draws(4, seed=3)
    weights = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)
    hessian = x.mT @ (weights[:, None] * x)
    w = torch.linalg.solve(hessian, x.mT @ (weights * y))
    return Problem(
        lambda p, h, _: (h["s"] * (x @ _vector(p) - y) ** 2).sum() / 2,
        lambda p, h: ((_vector(p) - c) ** 2).sum() / 2,
        _start(4), {"s": weights}, w, hessian, w - c, (x @ w - y)[:, None] * x, torch.zeros_like(weights),
    )  # fmt: skip


def logistic() -> Problem:
    """Logistic regression with one log-penalty; its optimum is found by Newton's method."""
    x, c = draws(50, 4, seed=1), draws(4, seed=3)
    signs = torch.where(draws(50, seed=2) > 0, 1.0, -1.0).double()
    log = torch.tensor(-1.0, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(30):
        chance = torch.sigmoid(-signs * (x @ w))
        hessian = x.mT @ ((chance * (1 - chance))[:, None] * x) / 50 + log.exp() * torch.eye(4, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, -x.mT @ (signs * chance) / 50 + log.exp() * w)
    return Problem(
        lambda p, h, _: torch.nn.functional.softplus(-signs * (x @ _vector(p))).mean()
        + h["l"].exp() * (_vector(p) ** 2).sum() / 2,
        lambda p, h: ((_vector(p) - c) ** 2).sum() / 2,
        _start(4), {"l": log}, w, hessian, w - c, (log.exp() * w)[None], torch.zeros(1, dtype=torch.float64),
    )  # fmt: skip


PROBLEMS = {
    "ridge": ridge,
    "quadratic": quadratic,
    "weighted_least_squares": weighted_least_squares,
    "logistic": logistic,
}
