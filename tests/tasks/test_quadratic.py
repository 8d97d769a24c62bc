"""Quadratic bowls of several spectra and shapes, and those over matrices."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.func import grad, grad_and_value, hessian, vmap

from metaopt import tree
from metaopt.task import stack_configs
from metaopt_tasks.quadratic import SHAPES, SPECTRA, KroneckerQuadratic, Quadratic, kronecker_quadratic, quadratic


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def members() -> list[Quadratic]:
    return [
        *(quadratic(dim=12, spectrum=spectrum, shape=shape, seed=1) for spectrum in SPECTRA for shape in SHAPES),
        quadratic(dim=12, condition=1e6, rotated=False, seed=2),
        *(kronecker_quadratic(rows=5, columns=7, shape=shape, seed=3) for shape in SHAPES),
    ]


@pytest.mark.parametrize("task", members(), ids=lambda task: f"{type(task).__name__}_{task.shape}")
def test_the_known_optimum_is_one_and_starts_are_near_one(task: Quadratic) -> None:
    gradient, loss = grad_and_value(task.loss)(task.optimum(), {})
    assert float(loss) == 0
    assert not any(g.any() for g in gradient.values())
    starts = vmap(task.loss, in_dims=(0, None))(tree.stack([task.init(generator(seed)) for seed in range(200)]), {})
    assert bool((starts > 0).all())
    if task.shape == "bowl":
        assert float(starts.mean()) / task.scale == pytest.approx(1.0, abs=0.25)
    assert 0.4 < float(task.normalize(starts).mean()) < 1.5


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rotated", [True, False])
def test_the_hessian_has_the_asked_condition_number_and_axes(spectrum: str, rotated: bool) -> None:
    task = quadratic(dim=10, condition=1e4, spectrum=spectrum, rotated=rotated)
    curvature = hessian(lambda x: task.loss({"x": x}, {}))(torch.zeros(10, dtype=torch.float64))
    values = np.linalg.eigvalsh(curvature.numpy())
    assert values[0] == pytest.approx(1, rel=0.01) and values[-1] == pytest.approx(1e4, rel=1e-4)
    off_diagonal = (curvature - curvature.diagonal().diag()).abs().max()
    assert (float(off_diagonal) > 1) == rotated


def test_spectra_are_what_they_are_called() -> None:
    scales = quadratic(dim=6, condition=50.0, spectrum="two_scales", rotated=False).config["A"].diagonal()
    assert scales.tolist() == [1.0, 1.0, 1.0, 50.0, 50.0, 50.0]
    power = quadratic(dim=16, condition=256.0, spectrum="power_law", rotated=False).config["A"].diagonal()
    torch.testing.assert_close(power, 256 / torch.arange(1.0, 17.0) ** 2)


def test_only_the_log_shape_is_not_convex() -> None:
    far = 3.0 * torch.ones(4, dtype=torch.float64)
    for shape, convex in [("bowl", True), ("root", True), ("log", False)]:
        task = quadratic(dim=4, shape=shape)
        assert (np.linalg.eigvalsh(hessian(lambda x, t=task: t.loss({"x": x}, {}))(far).numpy()).min() > 0) == convex


def test_the_curvature_over_a_matrix_is_the_kronecker_product() -> None:
    task = kronecker_quadratic(rows=3, columns=4, condition=100.0)
    curvature = hessian(lambda w: task.loss({"weight": w.reshape(3, 4)}, {}))(torch.zeros(12, dtype=torch.float64))
    a, b = (task.config[name].double().numpy() for name in ("A", "B"))
    np.testing.assert_allclose(curvature.numpy(), np.kron(a, b), rtol=1e-6, atol=1e-6)
    assert np.linalg.cond(curvature.numpy()) == pytest.approx(100.0, rel=1e-3)


def test_a_step_that_undoes_both_sides_solves_the_kronecker_bowl_at_once() -> None:
    task = kronecker_quadratic(rows=4, columns=6, condition=1e4)
    start = {name: p.double() for name, p in task.init(generator(0)).items()}
    gradient = grad(task.loss)(start, {})["weight"]
    a, b = task.config["A"].double(), task.config["B"].double()
    end = start["weight"] - torch.linalg.solve(a, gradient) @ torch.linalg.inv(b)
    assert float(task.loss({"weight": end}, {})) == pytest.approx(0, abs=1e-9)


def test_noise_over_a_matrix_has_the_asked_size_and_spares_evaluation() -> None:
    task = kronecker_quadratic(rows=3, columns=5, noise=2.0, batch_size=4)
    noise = task.train.tensors["noise"]
    assert noise.shape[1:] == (3, 5) and float(noise.std()) == pytest.approx(2.0, rel=0.02)
    params = task.init(generator(0))
    added = grad(task.loss)(params, {"noise": noise[:4]})["weight"] - grad(task.loss)(params, {})["weight"]
    torch.testing.assert_close(added, noise[:4].mean(0), atol=1e-3, rtol=1e-3)
    assert not task.valid.tensors and not task.test.tensors


@pytest.mark.parametrize("make", [quadratic, kronecker_quadratic])
def test_float64_parameters_take_float32_numbers(make: Callable[..., Quadratic]) -> None:
    task = make(noise=1.0, batch_size=4)
    params = {name: p.double() for name, p in task.init(generator(0)).items()}
    assert task.loss(params, task.train.take(torch.arange(4))).dtype == torch.float64


def test_members_over_matrices_stack() -> None:
    tasks = [kronecker_quadratic(rows=3, columns=4, seed=seed) for seed in range(3)]
    params = [task.init(generator(0)) for task in tasks]
    losses = vmap(tasks[0].loss)(tree.stack(params), stack_configs(tasks))
    expected = [task.loss(p, {}) for task, p in zip(tasks, params, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_the_matrix_of_a_kronecker_bowl_is_a_hidden_weight() -> None:
    info = kronecker_quadratic(rows=3, columns=4).info()["weight"]
    assert (info.role, info.fan_in, info.fan_out) == ("hidden", 4, 3)
    assert isinstance(kronecker_quadratic(), KroneckerQuadratic)


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="spectrum must be one of log_uniform"):
        quadratic(spectrum="flat")
    with pytest.raises(ValueError, match="shape must be one of bowl"):
        kronecker_quadratic(shape="flat")
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        kronecker_quadratic(rows=1)
    with pytest.raises(ValueError, match=r"condition must be at least 1, got 0\.5"):
        kronecker_quadratic(condition=0.5)
    assert math.isfinite(kronecker_quadratic(condition=1.0).scale)
