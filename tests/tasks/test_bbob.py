"""The BBOB-like set: optima, and closed forms where rotations do not matter."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, vmap

from metaopt import tree
from metaopt.task import Batch, stack_configs
from metaopt_tasks import bbob as module
from metaopt_tasks.bbob import FUNCTIONS, BlackBox, bbob

DIM = 6


def numbers(function: str, dim: int = DIM, seed: int = 3) -> Batch:
    return module._numbers(function, dim, torch.Generator().manual_seed(seed))


def unturned(dim: int = DIM) -> Batch:
    """No rotation, optimum at 0."""
    eye = torch.eye(dim, dtype=torch.float64)
    return {"x_opt": torch.zeros(dim, dtype=torch.float64), "R": eye, "Q": eye}


def points(count: int, dim: int = DIM) -> Tensor:
    return 10 * torch.rand(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 5


@pytest.mark.parametrize("dim", [2, 3, 20])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_optimum_has_value_and_gradient_zero_and_nothing_lies_below_it(function: str, dim: int) -> None:
    n = numbers(function, dim)
    gradient, value = grad_and_value(FUNCTIONS[function])(n["x_opt"], n)
    assert float(value) == pytest.approx(0, abs=1e-10)
    assert float(gradient.abs().max()) < 1e-6
    assert float(n["x_opt"].abs().max()) <= 5 or function in ("rosenbrock_rotated", "griewank_rosenbrock")
    near = n["x_opt"] + 0.2 * points(1000, dim)
    assert float(vmap(lambda x: FUNCTIONS[function](x, n))(torch.cat([points(2000, dim), near])).min()) > -1e-10


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tasks_are_zero_at_their_optimum_and_near_one_at_a_start(function: str) -> None:
    task = bbob(function=function, dim=5, seed=4)
    exact = {key: value.double() for key, value in task.config.items()}
    assert float(task.normalize(task.loss(task.optimum(), {}))) < 0.1
    assert all(bool(torch.isfinite(g).all()) for g in grad(task.loss)(task.optimum(), exact).values())
    starts = tree.stack([task.init(torch.Generator().manual_seed(1000 + seed)) for seed in range(300)])
    losses = vmap(task.loss, in_dims=(0, None))(starts, {})
    assert float(task.normalize(losses.median())) == pytest.approx(1.0, abs=0.1)
    assert float(starts["x"].abs().max()) <= 1


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - {"step_ellipsoid", "katsuura"}))
def test_gradients_are_those_of_finite_differences(function: str) -> None:
    n = numbers(function)
    x = points(1)[0]
    found = grad(FUNCTIONS[function])(x, n).numpy()
    step = 1e-9 if function == "weierstrass" else 1e-7
    expected = scipy.optimize.approx_fprime(
        x.numpy(), lambda at: float(FUNCTIONS[function](torch.as_tensor(at), n)), step
    )
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max() + 1e-4)


def test_the_step_ellipsoid_has_plateaus_and_yet_a_gradient() -> None:
    n = numbers("step_ellipsoid")
    x = points(1)[0]
    value, moved = (FUNCTIONS["step_ellipsoid"](at, n) for at in (x, x + 1e-9))
    assert float(value) == float(moved)
    assert bool(grad(FUNCTIONS["step_ellipsoid"])(x, n).any())


def test_oscillation_keeps_signs_and_scales_and_has_the_published_fixed_points() -> None:
    x = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0], dtype=torch.float64)
    y = module.oscillated(x)
    assert torch.equal(y.sign(), x.sign())
    assert y[[1, 2, 3]].tolist() == [-1.0, 0.0, 1.0], "ln 1 = 0"
    log = math.log(100.0)
    assert float(y[4]) == pytest.approx(math.exp(log + 0.049 * (math.sin(10 * log) + math.sin(7.9 * log))), rel=1e-12)
    assert float(y[0]) == pytest.approx(-math.exp(log + 0.049 * (math.sin(5.5 * log) + math.sin(3.1 * log))), rel=1e-12)


def test_skewing_leaves_negative_and_first_coordinates() -> None:
    x = torch.tensor([4.0, -4.0, 4.0], dtype=torch.float64)
    assert module.skewed(x, 0.5).tolist() == pytest.approx([4.0, -4.0, 4.0 ** (1 + 0.5 * 1 * 2)])


def test_the_box_is_penalised_outside_only() -> None:
    assert float(module.outside(torch.tensor([5.0, -7.0, 4.0]))) == 4.0


def test_functions_that_no_rotation_changes_have_their_closed_forms() -> None:
    x, n = points(1)[0], numbers("sphere")
    assert float(FUNCTIONS["sphere"](x, n)) == pytest.approx(np.sum((x.numpy() - n["x_opt"].numpy()) ** 2))
    n = numbers("rosenbrock")
    z = (x - n["x_opt"] + 1).numpy()
    assert float(FUNCTIONS["rosenbrock"](x, n)) == pytest.approx(scipy.optimize.rosen(z))
    n = numbers("rosenbrock_rotated")
    z = n["R"].numpy() @ x.numpy() + 0.5
    assert float(FUNCTIONS["rosenbrock_rotated"](x, n)) == pytest.approx(scipy.optimize.rosen(z))
    n = numbers("linear_slope")
    slope = 10 ** np.linspace(0, 1, DIM)
    expected = np.sum(slope * (5 - x.numpy() * np.sign(n["x_opt"].numpy())))
    assert float(FUNCTIONS["linear_slope"](x, n)) == pytest.approx(expected)


def test_unturned_functions_at_one_have_their_closed_forms() -> None:
    """At (1, ..., 1) the ripples vanish, and at unit scale so does the skew."""
    one, n, d = torch.ones(DIM, dtype=torch.float64), unturned(), DIM
    ramp = np.linspace(0, 1, d)
    rastrigin = np.sum(10 * (1 - np.cos(2 * np.pi * 10 ** (ramp / 2))) + 10**ramp)
    schaffers_z = 10 ** (ramp / 2)
    s = np.sqrt(schaffers_z[:-1] ** 2 + schaffers_z[1:] ** 2)
    expected = {
        "ellipsoid": np.sum(10 ** (6 * ramp)), "ellipsoid_rotated": np.sum(10 ** (6 * ramp)),
        "rastrigin": rastrigin, "rastrigin_rotated": rastrigin,
        "discus": 1e6 + d - 1, "bent_cigar": 1 + 1e6 * (d - 1), "different_powers": math.sqrt(d),
        "sharp_ridge": 1 + 100 * math.sqrt(np.sum(10 ** ramp[1:])),
        "schaffers": np.mean(np.sqrt(s) * (1 + np.sin(50 * s**0.2) ** 2)) ** 2,
        "griewank_rosenbrock": 10 / (d - 1) * sum(
            s / 4000 - math.cos(s) for s in [100 * (1.5**2 - 1.5) ** 2 + 0.5**2] * (d - 1)) + 10,
        "attractive_sector": module.oscillated(torch.tensor(np.sum(10**ramp))) ** 0.9,
    }  # fmt: skip
    for function, value in expected.items():
        assert float(FUNCTIONS[function](one, n)) == pytest.approx(float(value), rel=1e-9), function


def test_weierstrass_is_its_double_sum() -> None:
    n, x = unturned(2), torch.tensor([1.0, 1.0], dtype=torch.float64)
    z, k = np.array([1.0, 0.1]), np.arange(12)
    base = np.sum(0.5**k * np.cos(np.pi * 3.0**k))
    total = np.mean([np.sum(0.5**k * np.cos(2 * np.pi * 3.0**k * (z_i + 0.5))) - base for z_i in z])
    assert float(FUNCTIONS["weierstrass"](x, n)) == pytest.approx(10 * total**3, rel=1e-6)


def test_katsuura_is_its_product() -> None:
    n, x = unturned(2), torch.tensor([0.3, -0.17], dtype=torch.float64)
    z = [0.3, -1.7]
    sums = [sum(abs(2**j * v - round(2**j * v)) / 2**j for j in range(1, 33)) for v in z]
    expected = 10 / 4 * ((1 + sums[0]) * (1 + 2 * sums[1])) ** (10 / 2**1.2) - 10 / 4
    assert float(FUNCTIONS["katsuura"](x, n)) == pytest.approx(expected, rel=1e-6)


def test_the_wrong_bowl_of_lunacek_costs_one_per_coordinate() -> None:
    n = unturned(4) | {"x_opt": torch.full((4,), 1.25, dtype=torch.float64)}
    s = 1 - 1 / (2 * math.sqrt(24) - 8.2)
    far = -math.sqrt((2.5**2 - 1) / s)
    at = torch.full((4,), far / 2, dtype=torch.float64)
    waves = 10 * (4 - np.sum(np.cos(2 * np.pi * 10 ** np.linspace(0, 1, 4) * (far - 2.5))))
    assert float(FUNCTIONS["lunacek"](at, n)) == pytest.approx(4 + waves)


@pytest.mark.parametrize(
    ("function", "peaks", "condition"), [("gallagher_101", 101, 1000**0.5), ("gallagher_21", 21, 1e3)]
)
def test_gallaghers_peaks_have_the_published_heights_and_shapes(function: str, peaks: int, condition: float) -> None:
    n = numbers(function)
    assert len(n["peaks"]) == len(n["heights"]) == len(n["metric"]) == peaks
    assert n["heights"][[0, 1, -1]].tolist() == pytest.approx([10.0, 1.1, 9.1])
    ratios = n["metric"].amax(1) / n["metric"].amin(1)
    assert float(ratios[0]) == pytest.approx(condition)
    assert float(ratios[1:].min()) == pytest.approx(1) and float(ratios[1:].max()) == pytest.approx(1e3)
    second = n["peaks"][-1]
    assert float(FUNCTIONS[function](second, n)) <= float(module.oscillated(torch.tensor(0.9))) ** 2 + 1e-6


def test_seeds_turn_and_move_the_functions_and_members_stack() -> None:
    tasks: list[BlackBox] = [bbob(function="ellipsoid_rotated", dim=5, seed=seed) for seed in range(3)]
    assert not torch.equal(tasks[0].config["R"], tasks[1].config["R"])
    torch.testing.assert_close(tasks[0].config["R"] @ tasks[0].config["R"].T, torch.eye(5))
    params = [task.init(torch.Generator().manual_seed(0)) for task in tasks]
    losses = vmap(tasks[0].loss)(tree.stack(params), stack_configs(tasks))  # type: ignore[arg-type]
    torch.testing.assert_close(losses, torch.stack([t.loss(p, {}) for t, p in zip(tasks, params, strict=True)]))


def test_rotations_couple_what_the_axes_do_not() -> None:
    def coupling(function: str) -> float:
        n = numbers(function)
        curvature = hessian(lambda x: FUNCTIONS[function](x, n))(points(1)[0])
        return float((curvature - curvature.diagonal().diag()).abs().max() / curvature.abs().max())

    assert coupling("ellipsoid") < 1e-12 < 1e-2 < coupling("ellipsoid_rotated")


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="function must be one of sphere"):
        bbob(function="ackley")
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        bbob(dim=1)
