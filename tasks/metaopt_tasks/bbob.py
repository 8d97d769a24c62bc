"""A black-box set like BBOB: the formulas of its 24 noiseless functions, with rotations and places of our own.

Hansen, Finck, Ros and Auger 2009, "Real-Parameter Black-Box Optimization Benchmarking 2009: Noiseless Functions
Definitions", INRIA RR-6829. The names x^opt, R, Q, Lambda, T_osz, T_asy and f_pen are the report's. What differs: random
numbers come from torch, the lowest value is 0, and values are in units of the median over the starts; so results do not
compare with those of COCO. Coordinates here are a fifth of the report's: its [-5, 5] is [-1, 1].
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
from metaopt_tasks.landscape import RUGGED, SMOOTH, Landscape, length, root
from metaopt_tasks.quadratic import rotation

HALF_WIDTH = 5.0


def _ramp(x: Tensor) -> Tensor:
    """(i - 1) / (dim - 1): 0 to 1 over the coordinates."""
    return torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)


def _powers(x: Tensor, top: float) -> Tensor:
    """1 to ``top`` over the coordinates, log-spaced; Lambda^alpha is the square root of ``_powers(x, alpha)``."""
    return torch.exp(math.log(top) * _ramp(x))


def _scaled(x: Tensor, alpha: float) -> Tensor:
    """Lambda^alpha x."""
    return _powers(x, math.sqrt(alpha)) * x


def oscillated(x: Tensor) -> Tensor:
    """T_osz: x with smooth irregular ripples, alike on all scales."""
    log = torch.where(x == 0, 1.0, x.abs()).log()
    fast, slow = torch.where(x > 0, 10 * log, 5.5 * log), torch.where(x > 0, 7.9 * log, 3.1 * log)
    return x.sign() * torch.exp(log + 0.049 * (torch.sin(fast) + torch.sin(slow)))


def skewed(x: Tensor, beta: float) -> Tensor:
    """T_asy^beta: stretches positive coordinates, the later the more."""
    positive = torch.where(x > 0, x, 1.0)
    return torch.where(x > 0, positive ** (1 + beta * _ramp(x) * positive.sqrt()), x)


def outside(x: Tensor) -> Tensor:
    """f_pen: squared distance from the box [-5, 5]."""
    return (x.abs() - HALF_WIDTH).clamp_min(0).square().sum()


def _rastrigin(z: Tensor) -> Tensor:
    return 10 * (1 - torch.cos(2 * math.pi * z)).sum() + z.square().sum()


def _rosenbrock(z: Tensor) -> Tensor:
    return (100 * (z[:-1] ** 2 - z[1:]) ** 2 + (z[:-1] - 1) ** 2).sum()


def _stretch(x: Tensor) -> float:
    """max(1, sqrt(dim) / 8)."""
    return max(1.0, math.sqrt(len(x)) / 8)


# Each function takes x in [-5, 5]^dim and the member's numbers: x_opt [dim], R and Q [dim, dim], and others.


def sphere(x: Tensor, n: Batch) -> Tensor:
    """f1."""
    return (x - n["x_opt"]).square().sum()


def ellipsoid(x: Tensor, n: Batch) -> Tensor:
    """f2: condition 1e6 along the axes."""
    z = oscillated(x - n["x_opt"])
    return (_powers(x, 1e6) * z**2).sum()


def rastrigin(x: Tensor, n: Batch) -> Tensor:
    """f3."""
    return _rastrigin(_scaled(skewed(oscillated(x - n["x_opt"]), 0.2), 10))


def bueche_rastrigin(x: Tensor, n: Batch) -> Tensor:
    """f4: more asymmetric than f3."""
    z = oscillated(x - n["x_opt"])
    odd = torch.arange(len(x), device=x.device) % 2 == 0  # the report counts from 1
    z = z * _powers(x, math.sqrt(10)) * torch.where(odd & (z > 0), 10.0, 1.0)
    return _rastrigin(z) + 100 * outside(x)


def linear_slope(x: Tensor, n: Batch) -> Tensor:
    """f5: the optimum is a corner of the box, and everything beyond it is as good."""
    z = torch.where(n["x_opt"] * x < HALF_WIDTH**2, x, n["x_opt"])
    slope = n["x_opt"].sign() * _powers(x, 10)
    return (HALF_WIDTH * slope.abs() - slope * z).sum()


def attractive_sector(x: Tensor, n: Batch) -> Tensor:
    """f6: only a small sector of the space is low."""
    z = n["Q"] @ _scaled(n["R"] @ (x - n["x_opt"]), 10)
    total = oscillated((torch.where(z * n["x_opt"] > 0, 100.0, 1.0) * z).square().sum())
    return torch.where(total > 0, torch.where(total > 0, total, 1.0) ** 0.9, 0.0)


def step_ellipsoid(x: Tensor, n: Batch) -> Tensor:
    """f7: plateaus. Its value is the report's; its gradient passes through the rounding, or there would be none."""
    z = _scaled(n["R"] @ (x - n["x_opt"]), 10)
    steps = torch.where(z.abs() > 0.5, torch.floor(0.5 + z), torch.floor(0.5 + 10 * z) / 10)
    rounded = n["Q"] @ (z + (steps - z).detach())
    total = (_powers(x, 100) * rounded**2).sum()
    return 0.1 * torch.maximum(z[0].abs() / 1e4, total) + outside(x)


def rosenbrock(x: Tensor, n: Batch) -> Tensor:
    """f8."""
    return _rosenbrock(_stretch(x) * (x - n["x_opt"]) + 1)


def rosenbrock_rotated(x: Tensor, n: Batch) -> Tensor:
    """f9."""
    return _rosenbrock(_stretch(x) * (n["R"] @ x) + 0.5)


def ellipsoid_rotated(x: Tensor, n: Batch) -> Tensor:
    """f10."""
    z = oscillated(n["R"] @ (x - n["x_opt"]))
    return (_powers(x, 1e6) * z**2).sum()


def discus(x: Tensor, n: Batch) -> Tensor:
    """f11: one direction a million times as steep as all others."""
    z = oscillated(n["R"] @ (x - n["x_opt"]))
    return 1e6 * z[0] ** 2 + z[1:].square().sum()


def bent_cigar(x: Tensor, n: Batch) -> Tensor:
    """f12: a smooth narrow ridge that is not straight."""
    z = n["R"] @ skewed(n["R"] @ (x - n["x_opt"]), 0.5)
    return z[0] ** 2 + 1e6 * z[1:].square().sum()


def sharp_ridge(x: Tensor, n: Batch) -> Tensor:
    """f13: a ridge without a derivative across it."""
    z = n["Q"] @ _scaled(n["R"] @ (x - n["x_opt"]), 10)
    return z[0] ** 2 + 100 * length(z[1:])


def different_powers(x: Tensor, n: Batch) -> Tensor:
    """f14: exponents from 2 to 6."""
    z = n["R"] @ (x - n["x_opt"])
    return root((z.abs() ** (2 + 4 * _ramp(x))).sum())


def rastrigin_rotated(x: Tensor, n: Batch) -> Tensor:
    """f15."""
    z = skewed(oscillated(n["R"] @ (x - n["x_opt"])), 0.2)
    return _rastrigin(n["R"] @ _scaled(n["Q"] @ z, 10))


def weierstrass(x: Tensor, n: Batch) -> Tensor:
    """f16: rough on every scale, with many global optima."""
    z = n["R"] @ _scaled(n["Q"] @ oscillated(n["R"] @ (x - n["x_opt"])), 0.01)
    k = torch.arange(12, dtype=x.dtype, device=x.device)
    # cos(2 pi 3^k (z + 1/2)) - cos(2 pi 3^k / 2), which is -cos(2 pi 3^k z) + 1 as 3^k is odd
    waves = 1 - torch.cos(2 * math.pi * torch.remainder(3.0**k * z[:, None], 1))
    return 10 * ((0.5**k * waves).sum() / len(x)) ** 3 + 10 / len(x) * outside(x)


def _schaffers(x: Tensor, n: Batch, alpha: float) -> Tensor:
    z = _scaled(n["Q"] @ skewed(n["R"] @ (x - n["x_opt"]), 0.5), alpha)
    squares = z[:-1] ** 2 + z[1:] ** 2
    s = torch.where(squares > 0, squares, 1.0) ** 0.25  # square root of the report's s
    waves = torch.where(squares > 0, s * (1 + torch.sin(50 * s**0.4) ** 2), 0.0)
    return waves.mean() ** 2 + 10 * outside(x)


def schaffers(x: Tensor, n: Batch) -> Tensor:
    """f17: waves whose frequency and height change from place to place."""
    return _schaffers(x, n, 10)


def schaffers_ill(x: Tensor, n: Batch) -> Tensor:
    """f18: f17 with condition 1000."""
    return _schaffers(x, n, 1000)


def griewank_rosenbrock(x: Tensor, n: Batch) -> Tensor:
    """f19: Griewank's function of Rosenbrock's terms."""
    z = _stretch(x) * (n["R"] @ x) + 0.5
    s = 100 * (z[:-1] ** 2 - z[1:]) ** 2 + (z[:-1] - 1) ** 2
    return 10 * (s / 4000 + 1 - torch.cos(s)).mean()


def schwefel(x: Tensor, n: Batch) -> Tensor:
    """f20: the best minima lie near the corners."""
    at = 2 * n["x_opt"].abs()
    turned = 2 * n["x_opt"].sign() * x
    before = torch.cat([torch.zeros_like(x[:1]), 0.25 * (turned - at)[:-1]])
    z = 100 * (_scaled(turned + before - at, 10) + at)
    waves = z * torch.sin(root(z.abs()))
    # per coordinate, 418.9828872724339 is the highest that waves can be within 500
    return (418.9828872724339 - waves).mean() / 100 + 100 * outside(z / 100)


def gallagher(x: Tensor, n: Batch) -> Tensor:
    """f21 and f22: the highest of 101 or 21 peaks of random places, heights and shapes."""
    offsets = (x - n["peaks"]) @ n["R"].T  # [peaks, dim]
    heights = n["heights"] * torch.exp(-0.5 * (n["metric"] * offsets**2).mean(1))
    return oscillated(10 - heights.amax()) ** 2 + outside(x)


def katsuura(x: Tensor, n: Batch) -> Tensor:
    """f23: a product of functions that have no derivative at any place that a computer knows."""
    z = n["Q"] @ _scaled(n["R"] @ (x - n["x_opt"]), 100)
    scale = 2.0 ** torch.arange(1, 33, dtype=x.dtype, device=x.device)
    waves = (scale * z[:, None] - torch.round(scale * z[:, None])).abs() / scale
    index = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    product = ((1 + index * waves.sum(1)) ** (10 / len(x) ** 1.2)).prod()
    return 10 / len(x) ** 2 * (product - 1) + outside(x)


def lunacek(x: Tensor, n: Batch) -> Tensor:
    """f24: Rastrigin's function on two bowls, of which the wide one is not the best."""
    dim, near = len(x), 2.5
    ratio = 1 - 1 / (2 * math.sqrt(dim + 20) - 8.2)
    far = -math.sqrt((near**2 - 1) / ratio)
    turned = 2 * n["x_opt"].sign() * x
    z = n["Q"] @ _scaled(n["R"] @ (turned - near), 100)
    bowls = torch.minimum((turned - near).square().sum(), dim + ratio * (turned - far).square().sum())
    return bowls + 10 * (1 - torch.cos(2 * math.pi * z)).sum() + 1e4 * outside(x)


FUNCTIONS: Mapping[str, Callable[[Tensor, Batch], Tensor]] = {
    "sphere": sphere, "ellipsoid": ellipsoid, "rastrigin": rastrigin, "bueche_rastrigin": bueche_rastrigin,
    "linear_slope": linear_slope, "attractive_sector": attractive_sector, "step_ellipsoid": step_ellipsoid,
    "rosenbrock": rosenbrock, "rosenbrock_rotated": rosenbrock_rotated, "ellipsoid_rotated": ellipsoid_rotated,
    "discus": discus, "bent_cigar": bent_cigar, "sharp_ridge": sharp_ridge, "different_powers": different_powers,
    "rastrigin_rotated": rastrigin_rotated, "weierstrass": weierstrass, "schaffers": schaffers,
    "schaffers_ill": schaffers_ill, "griewank_rosenbrock": griewank_rosenbrock, "schwefel": schwefel,
    "gallagher_101": gallagher, "gallagher_21": gallagher, "katsuura": katsuura, "lunacek": lunacek,
}  # fmt: skip
"""f1 to f24, in the report's order."""

_RUGGED = (
    "rastrigin", "rastrigin_rotated", "weierstrass", "schaffers", "schaffers_ill", "griewank_rosenbrock",
    "gallagher_101", "gallagher_21", "katsuura", "lunacek",
)  # fmt: skip


def _numbers(function: str, dim: int, generator: Generator) -> Batch:
    """What the generator decides: ``x_opt``, ``R``, ``Q``, and for Gallagher's functions the peaks; float64."""

    def uniform(*shape: int, reach: float) -> Tensor:
        return reach * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)

    x_opt, signs = uniform(dim, reach=4.0), uniform(dim, reach=1.0).sign()
    r, q = rotation(dim, generator), rotation(dim, generator)
    if function == "linear_slope":
        x_opt = HALF_WIDTH * signs
    elif function == "rosenbrock":
        x_opt = 0.75 * x_opt
    elif function in ("rosenbrock_rotated", "griewank_rosenbrock"):
        x_opt = r.T @ torch.full_like(x_opt, 0.5 / _stretch(x_opt))  # where z is 1
    elif function == "schwefel":
        x_opt = 0.5 * 4.2096874633 * signs
    elif function == "lunacek":
        x_opt = 0.5 * 2.5 * signs
    numbers = {"x_opt": x_opt, "R": r, "Q": q}
    if function == "gallagher_101":
        numbers |= _peaks(x_opt, 101, 1e3, uniform(100, dim, reach=5.0), generator)
    elif function == "gallagher_21":
        numbers["x_opt"] = x_opt = 0.98 * x_opt
        numbers |= _peaks(x_opt, 21, 1e6, uniform(20, dim, reach=4.9), generator)
    return numbers


def _peaks(x_opt: Tensor, count: int, alpha: float, others: Tensor, generator: Generator) -> Batch:
    """Places [count, dim], heights [count] and inverse squared widths [count, dim] of Gallagher's peaks.

    The first peak, at ``x_opt``, is the highest; ``alpha`` is the report's alpha_1, the square of its condition number.
    """
    ranks = torch.arange(count - 1, dtype=torch.float64) / (count - 2)
    alphas = 1000 ** (2 * ranks[torch.randperm(count - 1, generator=generator)])
    alphas = torch.cat([alphas.new_tensor([alpha]), alphas])[:, None]
    metric = alphas ** (0.5 * _ramp(x_opt)) / alphas**0.25
    order = torch.rand(metric.shape, generator=generator, dtype=torch.float64).argsort(1)
    return {
        "peaks": torch.cat([x_opt[None], others]),
        "heights": torch.cat([ranks.new_tensor([10.0]), 1.1 + 8 * ranks]),
        "metric": metric.gather(1, order),
    }


@dataclass(eq=False)
class BlackBox(Landscape):
    """One of `FUNCTIONS` at 5 x, so that the search domain is [-1, 1]^dim; starts are uniform in it.

    ``config`` holds ``x_opt``, ``R``, ``Q``, ``unit``, and ``peaks``, ``heights`` and ``metric`` of Gallagher's functions.
    """

    function: str = "sphere"

    def init(self, generator: Generator) -> Params:
        """``x`` uniform in [-1, 1]."""
        return {"x": 2 * torch.rand(self.config["x_opt"].shape, generator=generator) - 1}

    def value(self, x: Tensor, numbers: Batch) -> Tensor:
        """The function in the report's coordinates."""
        return FUNCTIONS[self.function](HALF_WIDTH * x, numbers)

    def optimum(self) -> Params:
        """Where the loss is 0, as near as float32 can say it."""
        return {"x": self.config["x_opt"] / HALF_WIDTH}


def bbob(
    name: str = "bbob", function: str = "sphere", dim: int = 10, seed: int = 0, horizon: int = 200, device: Any = "cpu"
) -> BlackBox:
    """A BBOB-like function of ``dim`` numbers, at least 2; ``seed`` decides where its optimum is and how it is turned."""
    require_choice("function", function, FUNCTIONS)
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}; the functions couple neighbouring coordinates")
    numbers = _numbers(function, dim, Generator().manual_seed(seed))
    config = {key: number.float() for key, number in numbers.items()}
    none = Split()
    resolution = RUGGED if function in _RUGGED else SMOOTH
    return BlackBox(name, none, none, none, 1, horizon, config, resolution, function=function).measured().to(device)
