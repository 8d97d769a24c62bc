"""The classic test functions of optimisation, each moved so that its lowest value is 0 at a place that no rule can guess.

Formulas, usual domains and minima: Jamil and Yang 2013, "A literature survey of benchmark functions for global
optimization problems", arXiv:1308.4008; Surjanovic and Bingham, https://www.sfu.ca/~ssurjano/optimization.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import Params
from metaopt.task import Batch, Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.landscape import RUGGED, SMOOTH, Landscape, length


@dataclass(frozen=True)
class Function:
    """One test function.

    Attributes:
        formula: [dim] -> scalar, 0 at its lowest.
        low, high: ends of the usual domain in every coordinate.
        minimum: dim -> where the value is 0, one of them.
        dim: of the only version there is; 0 for any.
        multiple: that dim must be a multiple of.
        rugged: whether it has local minima not far below a usual start.
    """

    formula: Callable[[Tensor], Tensor]
    low: float
    high: float
    minimum: Callable[[int], list[float]]
    dim: int = 0
    multiple: int = 1
    rugged: bool = False


def _index(x: Tensor) -> Tensor:
    """1, 2, ..., dim."""
    return torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)


def rosenbrock(x: Tensor) -> Tensor:
    """Sum of 100 (x[i+1] - x[i]^2)^2 + (1 - x[i])^2: a curved valley (Rosenbrock 1960)."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def beale(x: Tensor) -> Tensor:
    """(1.5 - a + ab)^2 + (2.25 - a + ab^2)^2 + (2.625 - a + ab^3)^2: flat, with sharp corners (Beale 1958)."""
    a, b = x[0], x[1]
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


def himmelblau(x: Tensor) -> Tensor:
    """(a^2 + b - 11)^2 + (a + b^2 - 7)^2: four equal minima (Himmelblau 1972)."""
    a, b = x[0], x[1]
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


def booth(x: Tensor) -> Tensor:
    """(a + 2b - 7)^2 + (2a + b - 5)^2."""
    a, b = x[0], x[1]
    return (a + 2 * b - 7) ** 2 + (2 * a + b - 5) ** 2


def matyas(x: Tensor) -> Tensor:
    """0.26 (a^2 + b^2) - 0.48 ab: a narrow, slanted bowl."""
    a, b = x[0], x[1]
    return 0.26 * (a**2 + b**2) - 0.48 * a * b


def ackley(x: Tensor) -> Tensor:
    """-20 exp(-0.2 rms(x)) - exp(mean cos 2 pi x) + 20 + e: a hole in a bumpy plain (Ackley 1987)."""
    far = 20 * torch.exp(-0.2 * length(x) / math.sqrt(len(x)))
    return 20 - far + math.e - torch.exp(torch.cos(2 * math.pi * x).mean())


def rastrigin(x: Tensor) -> Tensor:
    """Sum of x^2 + 10 (1 - cos 2 pi x): a bowl with 11^dim pits (Rastrigin 1974)."""
    return (x**2 + 10 * (1 - torch.cos(2 * math.pi * x))).sum()


def griewank(x: Tensor) -> Tensor:
    """Sum x^2 / 4000 - product of cos(x[i] / sqrt(i)) + 1 (Griewank 1981)."""
    return (x**2).sum() / 4000 - torch.cos(x / _index(x).sqrt()).prod() + 1


def zakharov(x: Tensor) -> Tensor:
    """|x|^2 + s^2 + s^4 with s = sum 0.5 i x[i]: one direction is a quartic."""
    s = 0.5 * (_index(x) * x).sum()
    return (x**2).sum() + s**2 + s**4


def powell(x: Tensor) -> Tensor:
    """Powell's singular function in blocks of four; the Hessian at the minimum has rank two (Powell 1962)."""
    a, b, c, d = x.reshape(-1, 4).unbind(1)
    return ((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4).sum()


def branin(x: Tensor) -> Tensor:
    """Branin's function of a in [-5, 10] and b in [0, 15], here from [-1, 1]^2; three equal minima (Branin 1972)."""
    a, b = 2.5 + 7.5 * x[0], 7.5 + 7.5 * x[1]
    bowl = (b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6) ** 2
    # at the minima the bowl is 0 and cos a = -1
    return bowl + 10 * (1 - 1 / (8 * math.pi)) * (torch.cos(a) + 1)


def colville(x: Tensor) -> Tensor:
    """Colville's function of four numbers: two curved valleys, coupled (Colville 1968)."""
    a, b, c, d = x.unbind()
    valleys = 100 * (a**2 - b) ** 2 + (a - 1) ** 2 + (c - 1) ** 2 + 90 * (c**2 - d) ** 2
    return valleys + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)


def levy(x: Tensor) -> Tensor:
    """Levy's function: ripples on a bowl in w = 1 + (x - 1) / 4 (Levy and Montalvo 1985)."""
    w = 1 + (x - 1) / 4
    inner, last = w[:-1], w[-1]
    ripples = ((inner - 1) ** 2 * (1 + 10 * torch.sin(math.pi * inner + 1) ** 2)).sum()
    return torch.sin(math.pi * w[0]) ** 2 + ripples + (last - 1) ** 2 * (1 + torch.sin(2 * math.pi * last) ** 2)


def styblinski_tang(x: Tensor) -> Tensor:
    """Half the sum of x^4 - 16 x^2 + 5 x, plus 39.16616570377142 per coordinate: 2^dim minima, one lowest."""
    return (0.5 * (x**4 - 16 * x**2 + 5 * x) + 39.16616570377142).sum()


def dixon_price(x: Tensor) -> Tensor:
    """(x[1] - 1)^2 + sum of i (2 x[i]^2 - x[i-1])^2: each number depends on the one before (Dixon and Price 1989)."""
    return (x[0] - 1) ** 2 + (_index(x)[1:] * (2 * x[1:] ** 2 - x[:-1]) ** 2).sum()


def three_hump_camel(x: Tensor) -> Tensor:
    """2 a^2 - 1.05 a^4 + a^6 / 6 + ab + b^2: three minima, one lowest."""
    a, b = x[0], x[1]
    return 2 * a**2 - 1.05 * a**4 + a**6 / 6 + a * b + b**2


def goldstein_price(x: Tensor) -> Tensor:
    """Goldstein and Price's product of two polynomials, less 3: six orders of magnitude, four minima (1971)."""
    a, b = x[0], x[1]
    first = 1 + (a + b + 1) ** 2 * (19 - 14 * a + 3 * a**2 - 14 * b + 6 * a * b + 3 * b**2)
    second = 30 + (2 * a - 3 * b) ** 2 * (18 - 32 * a + 12 * a**2 + 48 * b - 36 * a * b + 27 * b**2)
    return first * second - 3


def _at(number: float) -> Callable[[int], list[float]]:
    return lambda dim: [number] * dim


FUNCTIONS: Mapping[str, Function] = {
    "rosenbrock": Function(rosenbrock, -2.048, 2.048, _at(1.0)),
    "beale": Function(beale, -4.5, 4.5, lambda dim: [3.0, 0.5], dim=2),
    "himmelblau": Function(himmelblau, -5, 5, lambda dim: [3.0, 2.0], dim=2),
    "booth": Function(booth, -10, 10, lambda dim: [1.0, 3.0], dim=2),
    "matyas": Function(matyas, -10, 10, _at(0.0), dim=2),
    "ackley": Function(ackley, -5, 5, _at(0.0), rugged=True),
    "rastrigin": Function(rastrigin, -5.12, 5.12, _at(0.0), rugged=True),
    "griewank": Function(griewank, -600, 600, _at(0.0)),
    "zakharov": Function(zakharov, -5, 10, _at(0.0)),
    "powell": Function(powell, -4, 5, _at(0.0), multiple=4),
    "branin": Function(branin, -1, 1, lambda dim: [(math.pi - 2.5) / 7.5, (2.275 - 7.5) / 7.5], dim=2),
    "colville": Function(colville, -10, 10, _at(1.0), dim=4),
    "levy": Function(levy, -10, 10, _at(1.0), rugged=True),
    "styblinski_tang": Function(styblinski_tang, -5, 5, _at(-2.9035340277711770), rugged=True),
    "dixon_price": Function(dixon_price, -10, 10, lambda dim: [2.0 ** (2.0 ** (1 - i) - 1) for i in range(1, dim + 1)]),
    "three_hump_camel": Function(three_hump_camel, -5, 5, _at(0.0), dim=2),
    "goldstein_price": Function(goldstein_price, -2, 2, lambda dim: [0.0, -1.0], dim=2),
}


@dataclass(eq=False)
class ClassicFunction(Landscape):
    """``function`` at centre + half-width (x - shift), where centre and half-width are those of its usual domain.

    ``config`` holds ``shift`` [dim] and ``unit``. Starts are uniform in the shifted domain.
    """

    function: str = "rosenbrock"

    def __post_init__(self) -> None:
        self._function = FUNCTIONS[self.function]
        self._center = (self._function.low + self._function.high) / 2
        self._half = (self._function.high - self._function.low) / 2

    def init(self, generator: Generator) -> Params:
        """``x`` uniform in [-1, 1] around ``shift``."""
        shift = self.config["shift"].cpu()
        return {"x": shift + 2 * torch.rand(shift.shape, generator=generator) - 1}

    def value(self, x: Tensor, numbers: Batch) -> Tensor:
        """The function in its own coordinates."""
        return self._function.formula(self._center + self._half * (x - numbers["shift"]))

    def optimum(self) -> Params:
        """One place where the loss is 0, as near as float32 can say it."""
        shift = self.config["shift"]
        minimum = torch.tensor(self._function.minimum(len(shift)), dtype=torch.float64, device=shift.device)
        return {"x": ((minimum - self._center) / self._half + shift).float()}


def test_function(
    name: str = "test_function",
    function: str = "rosenbrock",
    dim: int = 2,
    shift: float = 0.5,
    seed: int = 0,
    horizon: int = 200,
    device: Any = "cpu",
) -> ClassicFunction:
    """A classic test function of ``dim`` numbers, moved by a random vector.

    Args:
        name: of the task.
        function: a name in `FUNCTIONS`.
        dim: at least 2, or the only one that the function has.
        shift: standard deviation of the vector's entries, in half-widths of the domain.
        seed: of the vector.
        horizon: see `metaopt.task.Task`.
        device: see `metaopt.task.Task`.
    """
    require_choice("function", function, FUNCTIONS)
    known = FUNCTIONS[function]
    if known.dim and dim != known.dim:
        raise ValueError(f"dim of {function} must be {known.dim}, got {dim}")
    if dim < 2 or dim % known.multiple:
        wanted = f"a multiple of {known.multiple}" if known.multiple > 1 else "at least 2"
        raise ValueError(f"dim of {function} must be {wanted}, got {dim}")
    config = {"shift": shift * torch.randn(dim, generator=Generator().manual_seed(seed))}
    none = Split()
    resolution = RUGGED if known.rugged else SMOOTH
    return (
        ClassicFunction(name, none, none, none, 1, horizon, config, resolution, function=function).measured().to(device)
    )
