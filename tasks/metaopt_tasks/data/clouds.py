"""Clouds of points on random copies of known shapes, for networks that take sets.

Made in float64 from a fixed seed: each cloud is turned at random, scaled by 0.8 to 1.2, and blurred by Gaussian noise of
0.05. Classes are as frequent as each other.
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
from metaopt_tasks.data.load import moved, split_rows, standardized

SIZE, NOISE = 2000, 0.05

Uniforms = tuple[Tensor, Tensor, Tensor]


def clouds(kind: str, device: Any = "cpu") -> dict[str, Split]:
    """``input`` [N, points, d] float32 and ``label`` [N] int64 of a ``kind`` of shapes, a name in `KINDS`."""
    require_choice("kind", kind, KINDS)
    return moved(_clouds(kind), device)


@cache
def _clouds(kind: str) -> dict[str, Split]:
    points, shapes = KINDS[kind]
    generator = Generator().manual_seed(0)
    label = torch.arange(SIZE) % len(shapes)

    def draws() -> Tensor:
        return uniform(generator, SIZE, points)

    u, v, w = draws(), draws(), draws()
    made = torch.stack([torch.stack(shape((u, v, w)), -1) for shape in shapes])  # [classes, SIZE, points, d]
    cloud = made[label, torch.arange(SIZE)]
    dim = cloud.shape[-1]
    q, r = torch.linalg.qr(normal(generator, SIZE, dim, dim))
    turn = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # uniform over turns and mirrorings (Mezzadri 2007)
    scale = 0.8 + 0.4 * uniform(generator, SIZE, 1, 1)
    noise = normal(generator, *cloud.shape)
    return standardized(split_rows({"input": scale * cloud @ turn + NOISE * noise, "label": label}, label), "input")


def _signed(u: Tensor) -> Tensor:
    return 2 * u - 1


def _circular(radius: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    angle = 2 * math.pi * share
    return radius * angle.cos(), radius * angle.sin()


def _polygon(corners: int) -> Callable[[Uniforms], tuple[Tensor, ...]]:
    def outline(draws: Uniforms) -> tuple[Tensor, ...]:
        corner = (corners * draws[0]).floor()
        ends = [_circular(torch.ones_like(corner), (corner + i) / corners) for i in (0, 1)]
        return tuple(a + draws[1] * (b - a) for a, b in zip(*ends, strict=True))

    return outline


def _circle(draws: Uniforms) -> tuple[Tensor, ...]:
    return _circular(torch.ones_like(draws[0]), draws[0])


def _ellipse(draws: Uniforms) -> tuple[Tensor, ...]:
    x, y = _circle(draws)
    return 1.3 * x, 0.5 * y


def _cross(draws: Uniforms) -> tuple[Tensor, ...]:
    upright = (draws[1] < 0.5).double()
    along = 1.2 * _signed(draws[0])
    return along * upright, along * (1 - upright)


def _flower(draws: Uniforms) -> tuple[Tensor, ...]:
    return _circular(1 + 0.5 * (10 * math.pi * draws[0]).cos(), draws[0])


def _sphere(draws: Uniforms) -> tuple[Tensor, ...]:
    height = _signed(draws[1])
    return *_circular((1 - height.square()).sqrt(), draws[0]), height


def _cube(draws: Uniforms) -> tuple[Tensor, ...]:
    face = (6 * draws[2]).floor()
    a, b, c = 0.8 * _signed(draws[0]), 0.8 * _signed(draws[1]), 0.8 * (2 * (face % 2) - 1)
    axis = (face / 2).floor()
    x = torch.where(axis == 0, c, a)
    y = torch.where(axis == 1, c, torch.where(axis == 0, a, b))
    return x, y, torch.where(axis == 2, c, b)


def _cylinder(draws: Uniforms) -> tuple[Tensor, ...]:
    return *_circular(torch.full_like(draws[0], 0.7), draws[0]), _signed(draws[1])


def _cone(draws: Uniforms) -> tuple[Tensor, ...]:
    radius = draws[1].sqrt()
    return *_circular(radius, draws[0]), 1.5 * (2 / 3 - radius)


def _torus(draws: Uniforms) -> tuple[Tensor, ...]:
    out, up = _circular(torch.full_like(draws[1], 0.35), draws[1])
    return *_circular(0.9 + out, draws[0]), up


def _saddle(draws: Uniforms) -> tuple[Tensor, ...]:
    x, y = _signed(draws[0]), _signed(draws[1])
    return x, y, x.square() - y.square()


def _torus_knot(around: int, through: int) -> Callable[[Uniforms], tuple[Tensor, ...]]:
    """A curve that winds ``around`` times along a torus and ``through`` times through its hole."""

    def curve(draws: Uniforms) -> tuple[Tensor, ...]:
        out, up = _circular(torch.full_like(draws[0], 0.5), through * draws[0])
        return *_circular(1 + out, around * draws[0]), up

    return curve


def _figure_eight_knot(draws: Uniforms) -> tuple[Tensor, ...]:
    t = 2 * math.pi * draws[0]
    radius = (2 + (2 * t).cos()) / 2
    return radius * (3 * t).cos(), radius * (3 * t).sin(), 0.5 * (4 * t).sin()


def _lissajous(draws: Uniforms) -> tuple[Tensor, ...]:
    t = 2 * math.pi * draws[0]
    return (2 * t).cos(), (3 * t + 0.5).cos(), (5 * t + 1.0).cos()


KINDS: dict[str, tuple[int, tuple[Callable[[Uniforms], tuple[Tensor, ...]], ...]]] = {
    "outlines": (24, (_circle, _polygon(3), _polygon(4), _ellipse, _cross, _flower)),
    "surfaces": (32, (_sphere, _cube, _cylinder, _cone, _torus, _saddle)),
    "curves": (
        32, (_torus_knot(1, 0), _torus_knot(2, 3), _torus_knot(1, 6), _torus_knot(2, 1), _figure_eight_knot, _lissajous),
    ),
}  # fmt: skip
"""Kind -> (points per cloud, shape of each class: uniform numbers [N, points], three times, -> coordinates)."""
