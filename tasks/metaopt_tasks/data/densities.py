"""Points drawn from densities in the plane: what flows, diffusion models and GANs are shown with.

Made in float64 from a fixed seed, standardised by coordinate, and cut 70 % train, 15 % valid, 15 % test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.draws import normal, uniform
from metaopt_tasks.data.load import load, moved, split_rows, standardized

SIZE = 8000


def density(shape: str, device: Any = "cpu") -> dict[str, Split]:
    """``input`` [N, 2] float32, standardised: 5600, 1200 and 1200 points of the density ``shape``, a name in `SHAPES`."""
    require_choice("shape", shape, SHAPES)
    return moved(_points(shape), device)


@cache
def _points(shape: str) -> dict[str, Split]:
    points = SHAPES[shape](SIZE, Generator().manual_seed(0))
    return standardized(split_rows({"input": points}), "input", per_feature=True)


@cache
def density_entropy(data: str) -> float:
    """The `entropy` in nats of the train points of a registered source with ``input`` [N, d]."""
    return entropy(load(data)["train"].tensors["input"])


def entropy(points: Tensor, neighbours: int = 5) -> float:
    """Kozachenko and Leonenko's estimate, in nats, of the differential entropy that ``points`` [N, d] were drawn from.

    psi(N) - psi(k) + log V_d + d/N sum_i log r_i, with r_i the distance from point i to its k-th neighbour and V_d the
    volume of the unit ball (Kraskov et al. 2004, arXiv:cond-mat/0305641, equation 20). A few hundredths of a nat off
    for a few thousand points in the plane.
    """
    from scipy.spatial import cKDTree
    from scipy.special import digamma

    size, dim = points.shape
    table = points.double().cpu().numpy()
    distance = torch.from_numpy(cKDTree(table).query(table, neighbours + 1)[0][:, -1])
    log_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    return float(digamma(size) - digamma(neighbours) + log_ball + dim * distance.log().mean())


def _choice(size: int, choices: int, generator: Generator) -> Tensor:
    return torch.randint(choices, (size,), generator=generator)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _moons(size: int, generator: Generator) -> Tensor:
    """Two interleaved half circles."""
    angle, lower = math.pi * uniform(generator, size), _choice(size, 2, generator)[:, None]
    upper = _polar(torch.ones(size), angle)
    centre = torch.tensor([1.0, 0.5], dtype=torch.float64)
    return torch.where(lower == 1, centre - upper, upper) + 0.08 * normal(generator, size, 2)


def _rings(size: int, generator: Generator) -> Tensor:
    """Three concentric circles, each as likely."""
    radius = 1.0 + _choice(size, 3, generator).double()
    return _polar(radius, 2 * math.pi * uniform(generator, size)) + 0.1 * normal(generator, size, 2)


def _pinwheel(size: int, generator: Generator) -> Tensor:
    """Five Gaussian blades, twisted by exp(radius) / 4 (after Johnson et al. 2016, arXiv:1603.06277)."""
    along, across = (normal(generator, size, 2) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])).unbind(-1)
    turn = 2 * math.pi * _choice(size, 5, generator) / 5 + 0.25 * along.exp()
    return torch.stack([along * turn.cos() - across * turn.sin(), along * turn.sin() + across * turn.cos()], -1)


def _eight_gaussians(size: int, generator: Generator) -> Tensor:
    """Eight Gaussians of standard deviation 0.2 on a circle of radius 2."""
    angle = _choice(size, 8, generator).double() * (math.pi / 4)
    return _polar(torch.full((size,), 2.0), angle) + 0.2 * normal(generator, size, 2)


def _spiral(size: int, generator: Generator) -> Tensor:
    """Two arms of an Archimedean spiral, one turn and a half each."""
    angle, arm = 3 * math.pi * uniform(generator, size).sqrt(), _choice(size, 2, generator)
    return _polar(angle / 3, angle + math.pi * arm) + 0.1 * normal(generator, size, 2)


def _checkerboard(size: int, generator: Generator) -> Tensor:
    """Uniform on the eight dark squares of a 4 by 4 board."""
    x, row = 4 * uniform(generator, size), 2 * _choice(size, 2, generator)
    return torch.stack([x, uniform(generator, size) + row + x.floor() % 2], -1)


def _swiss_roll(size: int, generator: Generator) -> Tensor:
    """One arm from 1.5 pi to 4.5 pi of r = angle."""
    angle = 1.5 * math.pi * (1 + 2 * uniform(generator, size))
    return _polar(angle / 5, angle) + 0.1 * normal(generator, size, 2)


SHAPES: dict[str, Callable[[int, Generator], Tensor]] = {
    "moons": _moons,
    "rings": _rings,
    "pinwheel": _pinwheel,
    "eight_gaussians": _eight_gaussians,
    "spiral": _spiral,
    "checkerboard": _checkerboard,
    "swiss_roll": _swiss_roll,
}
