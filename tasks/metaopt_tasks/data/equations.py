"""Differential equations with known solutions, as points at which a network should satisfy them.

Points are uniform in the equation's box, drawn in float64 from a fixed seed; solutions are closed forms, or scipy's
eighth-order Runge-Kutta at tolerance 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.load import moved

TRAIN_POINTS, JUDGED_POINTS = 2048, 512

Residual = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``residual(x [B, d], u [B, m], first [d, B, m], second [d, B, m]) -> [B, m]``: zero where the equation holds.

``first[i]`` and ``second[i]`` are the first and second derivatives of u in coordinate i.
"""


@dataclass(frozen=True)
class Equation:
    """A well-posed problem on a box.

    Attributes:
        lower, upper: corners of the box; time comes last.
        sides: (coordinate, 0 for lower or 1 for upper): where values of the solution are given.
        order: of the highest derivative in ``residual``, 1 or 2.
        residual: see `Residual`.
        solution: points [N, d] float64 -> values [N, m] float64.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    sides: tuple[tuple[int, int], ...]
    order: int
    residual: Residual
    solution: Callable[[Tensor], Tensor]


def collocation(equation: str, device: Any = "cpu") -> dict[str, Split]:
    """Points of an equation in `EQUATIONS`: 2048 to train on, 512 each to validate and test.

    ``input`` [N, d] in the box and ``target`` [N, m], the solution there (which training must not look at);
    ``boundary`` [N, d] on the sides where values are given and ``boundary_target`` [N, m], those values. All float32.
    """
    require_choice("equation", equation, EQUATIONS)
    return moved(_collocation(equation), device)


@cache
def _collocation(name: str) -> dict[str, Split]:
    equation, generator = EQUATIONS[name], Generator().manual_seed(0)
    lower, upper = (torch.tensor(end, dtype=torch.float64) for end in (equation.lower, equation.upper))

    def inside(size: int) -> Tensor:
        return lower + (upper - lower) * torch.rand(size, len(lower), generator=generator, dtype=torch.float64)

    data = {}
    for split, size in {"train": TRAIN_POINTS, "valid": JUDGED_POINTS, "test": JUDGED_POINTS}.items():
        points, boundary = inside(size), inside(size)
        for row in range(size):  # the sides take turns
            coordinate, end = equation.sides[row % len(equation.sides)]
            boundary[row, coordinate] = (lower, upper)[end][coordinate]
        tensors = {
            "input": points, "target": equation.solution(points),
            "boundary": boundary, "boundary_target": equation.solution(boundary),
        }  # fmt: skip
        data[split] = Split({key: tensor.float() for key, tensor in tensors.items()})
    return data


def _ode(start: Sequence[float], field: Callable[[Tensor], Tensor], until: float) -> Equation:
    """u' = field(u) from ``start`` at time 0; solved numerically. ``field`` maps [..., m] to [..., m]."""

    def solution(points: Tensor) -> Tensor:
        from scipy.integrate import solve_ivp

        times, back = points[:, 0].unique(return_inverse=True)
        found = solve_ivp(
            lambda _, u: field(torch.from_numpy(u)).numpy(), (0.0, until), list(start), "DOP853", times.numpy(),
            rtol=1e-12, atol=1e-12,
        )  # fmt: skip
        return torch.from_numpy(found.y.T)[back]

    return Equation((0.0,), (until,), ((0, 0),), 1, lambda x, u, first, second: first[0] - field(u), solution)


def _logistic_solution(points: Tensor) -> Tensor:
    return 1 / (1 + (-points).exp())


_FREQUENCY, _DAMPING = 2.0, 0.1


def _oscillator_field(u: Tensor) -> Tensor:
    q, p = u.unbind(-1)
    return _FREQUENCY * torch.stack([p, -q - 2 * _DAMPING * p], -1)


def _oscillator_solution(points: Tensor) -> Tensor:
    t, decay = points[:, 0], _DAMPING * _FREQUENCY
    frequency = _FREQUENCY * math.sqrt(1 - _DAMPING**2)
    q = (frequency * t).cos() + decay / frequency * (frequency * t).sin()
    p = -_FREQUENCY / frequency * (frequency * t).sin()
    return (-decay * t).exp()[:, None] * torch.stack([q, p], -1)


def _pendulum_field(u: Tensor) -> Tensor:
    angle, speed = u.unbind(-1)
    return torch.stack([speed, -angle.sin()], -1)


def _lotka_volterra_field(u: Tensor) -> Tensor:
    prey, predators = u.unbind(-1)
    return torch.stack([prey * (1 - predators), predators * (prey - 1)], -1)


def _van_der_pol_field(u: Tensor) -> Tensor:
    q, p = u.unbind(-1)
    return torch.stack([p, (1 - q.square()) * p - q], -1)


def _sines(points: Tensor) -> Tensor:
    return (math.pi * points).sin() + 0.2 * (3 * math.pi * points).sin()


def _poisson_residual(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return second[0] / math.pi**2 + (math.pi * x).sin() + 1.8 * (3 * math.pi * x).sin()


_CONDUCTIVITY = 0.1


def _heat_solution(points: Tensor) -> Tensor:
    x, t = points.split(1, -1)

    def wave(k: int) -> Tensor:
        return (-_CONDUCTIVITY * (k * math.pi) ** 2 * t).exp() * (k * math.pi * x).sin()

    return wave(1) + 0.5 * wave(3)


def _advection_solution(points: Tensor) -> Tensor:
    x, t = points.split(1, -1)
    return (2 * math.pi * (x - 0.5 * t)).sin()


def _wave_solution(points: Tensor) -> Tensor:
    x, t = (math.pi * points).split(1, -1)
    return torch.cat([x.sin() * t.cos(), x.cos() * t.sin()], -1)


def _laplace_solution(points: Tensor) -> Tensor:
    x, y = (math.pi * points).split(1, -1)
    return x.sin() * y.sinh() / math.sinh(math.pi)


_VISCOSITY = 0.05


def _burgers_solution(points: Tensor) -> Tensor:
    """Cole and Hopf's solution from -sin(pi x), by Gauss-Hermite quadrature (Basdevant et al. 1986)."""
    from numpy.polynomial.hermite import hermgauss

    nodes, weights = (torch.from_numpy(a) for a in hermgauss(100))
    x, t = points.split(1, -1)
    y = math.pi * (x - (4 * _VISCOSITY * t).sqrt() * nodes)
    share = (-(y.cos() + 1) / (2 * math.pi * _VISCOSITY)).exp() * weights  # the 1 keeps the exponent below 0
    return -(y.sin() * share).sum(-1, keepdim=True) / share.sum(-1, keepdim=True)


def _helmholtz_solution(points: Tensor) -> Tensor:
    x, y = (math.pi * points).split(1, -1)
    return x.sin() * (2 * y).sin()


def _helmholtz_residual(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
    source = (1 - 5 * math.pi**2) * _helmholtz_solution(x)
    return (second[0] + second[1] + u - source) / (5 * math.pi**2)


_EVOLVING = ((1, 0), (0, 0), (0, 1))  # the start, and both ends of the interval
_CLOSED = ((0, 0), (0, 1), (1, 0), (1, 1))

EQUATIONS: dict[str, Equation] = {
    "logistic_ode": Equation((0.0,), (4.0,), ((0, 0),), 1, lambda x, u, d, dd: d[0] - u * (1 - u), _logistic_solution),
    "oscillator_ode": Equation(
        (0.0,), (4.0,), ((0, 0),), 1, lambda x, u, d, dd: (d[0] - _oscillator_field(u)) / _FREQUENCY, _oscillator_solution
    ),
    "pendulum_ode": _ode((2.0, 0.0), _pendulum_field, 6.0),
    "lotka_volterra_ode": _ode((1.5, 1.0), _lotka_volterra_field, 6.0),
    "van_der_pol_ode": _ode((2.0, 0.0), _van_der_pol_field, 6.0),
    "poisson_equation": Equation((-1.0,), (1.0,), ((0, 0), (0, 1)), 2, _poisson_residual, _sines),
    "heat_equation": Equation(
        (0.0, 0.0), (1.0, 1.0), _EVOLVING, 2, lambda x, u, d, dd: d[1] - _CONDUCTIVITY * dd[0], _heat_solution
    ),
    "advection_equation": Equation(
        (0.0, 0.0), (1.0, 1.0), ((1, 0), (0, 0)), 1, lambda x, u, d, dd: d[1] + 0.5 * d[0], _advection_solution
    ),
    "wave_equation": Equation(  # as a system of first order: u_t = v_x, v_t = u_x
        (0.0, 0.0), (1.0, 1.0), _EVOLVING, 1, lambda x, u, d, dd: (d[1] - d[0].flip(-1)) / math.pi, _wave_solution
    ),
    "laplace_equation": Equation(
        (0.0, 0.0), (1.0, 1.0), _CLOSED, 2, lambda x, u, d, dd: (dd[0] + dd[1]) / math.pi**2, _laplace_solution
    ),
    "burgers_equation": Equation(
        (-1.0, 0.0), (1.0, 1.0), _EVOLVING, 2,
        lambda x, u, d, dd: d[1] + u * d[0] - _VISCOSITY * dd[0], _burgers_solution,
    ),
    "helmholtz_equation": Equation((-1.0, -1.0), (1.0, 1.0), _CLOSED, 2, _helmholtz_residual, _helmholtz_solution),
}  # fmt: skip
