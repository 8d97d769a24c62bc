"""Classic test functions: formulas, minima and how they are moved."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, grad_and_value, hessian, vmap

from metaopt import tree
from metaopt.task import stack_configs
from metaopt_tasks import test_functions as module
from metaopt_tasks.test_functions import FUNCTIONS, ClassicFunction


def make(function: str, seed: int = 1) -> ClassicFunction:
    return module.test_function(function=function, dim=FUNCTIONS[function].dim or 8, seed=seed)


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PUBLISHED: dict[str, list[tuple[list[float], float]]] = {
    "beale": [([0.0, 0.0], 14.203125), ([1.0, 1.0], 14.203125)],
    "himmelblau": [([0.0, 0.0], 170.0), ([-2.805118, 3.131312], 0.0), ([-3.779310, -3.283186], 0.0)],
    "booth": [([0.0, 0.0], 74.0), ([1.0, 1.0], 20.0)],
    "matyas": [([1.0, 1.0], 0.04), ([10.0, -10.0], 100.0)],
    "ackley": [([1.0, 1.0], 20 - 20 * math.exp(-0.2))],
    "rastrigin": [([1.0, 2.0], 5.0), ([0.5, 0.5], 40.5)],
    "griewank": [([math.pi, 0.0], 2 + math.pi**2 / 4000)],
    "zakharov": [([1.0, 1.0], 2 + 2.25 + 5.0625)],
    "powell": [([3.0, -1.0, 0.0, 1.0], 215.0)],
    "branin": [([0.0, 0.0], 55.602113 - 0.397887)],
    "colville": [([-3.0, -1.0, -3.0, -1.0], 19192.0)],
    "levy": [([5.0, 5.0], 2 + 10 * math.sin(1) ** 2)],
    "styblinski_tang": [([0.0, 0.0], 78.33233140754284), ([2.7468, -2.903534], 14.1368)],
    "dixon_price": [([0.0, 0.0], 1.0), ([1.0, 1.0], 2.0)],
    "three_hump_camel": [([1.0, 1.0], 3.1166666666666667), ([-1.747552, 0.873776], 0.298638)],
    "goldstein_price": [([0.0, 0.0], 597.0), ([-0.6, -0.4], 27.0), ([1.8, 0.2], 81.0), ([1.2, 0.8], 837.0)],
}  # fmt: skip
"""Values that are easy by hand, usual starts, and stationary values from the literature, less the minimum."""


@pytest.mark.parametrize("function", PUBLISHED)
def test_values_are_the_published_ones(function: str) -> None:
    for x, value in PUBLISHED[function]:
        if function == "branin":  # given in a in [-5, 10], b in [0, 15]
            x = [(x[0] - 2.5) / 7.5, (x[1] - 7.5) / 7.5]
        assert float(FUNCTIONS[function].formula(double(x))) == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_rosenbrock_is_scipys() -> None:
    x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(grad(FUNCTIONS["rosenbrock"].formula)(x).numpy(), scipy.optimize.rosen_der(x.numpy()))
    assert float(FUNCTIONS["rosenbrock"].formula(x)) == pytest.approx(scipy.optimize.rosen(x.numpy()))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_stated_minimum_is_one_and_nothing_lies_below_it(function: str) -> None:
    known = FUNCTIONS[function]
    dim = known.dim or 8
    at = double(known.minimum(dim))
    gradient, value = grad_and_value(known.formula)(at)
    assert float(value) == pytest.approx(0, abs=1e-9)
    assert float(gradient.abs().max()) < 1e-6
    assert np.linalg.eigvalsh(hessian(known.formula)(at).nan_to_num().numpy()).min() > -1e-9
    uniform = torch.rand(4000, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everywhere = known.low + (known.high - known.low) * uniform
    assert float(vmap(known.formula)(torch.cat([everywhere, at + 0.1 * (uniform - 0.5)])).min()) > -1e-9
    assert all(known.low <= number <= known.high for number in at.tolist())


@pytest.mark.parametrize("function", ["beale", "himmelblau", "branin", "goldstein_price", "three_hump_camel"])
def test_no_scipy_search_finds_less_than_zero(function: str) -> None:
    known = FUNCTIONS[function]
    corners = itertools.product(np.linspace(known.low, known.high, 5), repeat=2)
    found = [scipy.optimize.minimize(lambda x: float(known.formula(double(list(x)))), c).fun for c in corners]
    assert min(found) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tasks_are_zero_at_their_optimum_and_near_one_at_a_start(function: str) -> None:
    task = make(function)
    assert float(task.normalize(task.loss(task.optimum(), {}))) == pytest.approx(0, abs=0.02)
    starts = tree.stack([task.init(torch.Generator().manual_seed(1000 + seed)) for seed in range(300)])
    losses = vmap(task.loss, in_dims=(0, None))(starts, {})
    assert float(losses.median()) == pytest.approx(1.0, rel=0.4)
    assert float(task.normalize(losses.median())) == pytest.approx(1.0, abs=0.1)
    offsets = starts["x"] - task.config["shift"]
    assert float(offsets.abs().max()) <= 1 and float(offsets.std()) == pytest.approx(1 / math.sqrt(3), rel=0.1)


def test_a_shift_moves_the_function_and_nothing_else() -> None:
    one, other = make("levy", seed=1), make("levy", seed=2)
    x = torch.full((8,), 0.3, dtype=torch.float64)
    here, there = x + one.config["shift"].double(), x + other.config["shift"].double()
    assert not torch.equal(here, there)
    torch.testing.assert_close(one.loss({"x": here}, {}), other.loss({"x": there}, {}))
    stacked = {"x": torch.stack([here, there])}
    torch.testing.assert_close(*vmap(one.loss)(stacked, stack_configs([one, other])))


@pytest.mark.parametrize("function", ["ackley", "powell", "rosenbrock"])
def test_gradients_are_finite_everywhere_also_at_the_minimum(function: str) -> None:
    task = make(function)
    assert bool(torch.isfinite(grad(task.loss)(task.optimum(), {})["x"]).all())
    known = FUNCTIONS[function]
    assert not grad(known.formula)(double(known.minimum(8))).isnan().any()


def test_normalized_losses_follow_the_logarithm() -> None:
    task = make("rosenbrock")
    found = task.normalize(torch.tensor([0.0, 1e-3, 1.0, math.inf, -math.inf, math.nan]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0, 1.5, 0.0, 1.5]), atol=1e-3, rtol=0)


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="function must be one of rosenbrock"):
        module.test_function(function="sphere")
    with pytest.raises(ValueError, match="dim of beale must be 2, got 3"):
        module.test_function(function="beale", dim=3)
    with pytest.raises(ValueError, match="dim of powell must be a multiple of 4, got 6"):
        module.test_function(function="powell", dim=6)
    with pytest.raises(ValueError, match="dim of rosenbrock must be at least 2, got 1"):
        module.test_function(dim=1)
