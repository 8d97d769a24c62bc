"""Newton-Schulz iterations against what they do to singular values: short and long matrices, whole products, panels, NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import metaopt
from metaopt import matrix_cpu
from metaopt.cpp_kernels import CppKernels
from metaopt.matrix import QUINTIC, newton_schulz
from metaopt.replacing import replacing

SHAPES = [(6, 6), (6, 9), (6, 31), (31, 6), (1, 5), (5, 1), (3, 2, 4, 20), (2, 20, 4), (0, 3), (2, 0, 3, 4)]
IN_PANELS = [(256, 300), (2, 530, 260)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(matrices: Tensor, steps: int, eps: float) -> Tensor:
    """U p(S) V^T with the odd polynomial that a step is on a singular value."""
    a, b, c = QUINTIC
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / (torch.linalg.vector_norm(values, dim=-1, keepdim=True) + eps)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left * values.unsqueeze(-2) @ right


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [*SHAPES, *IN_PANELS], ids=str)
def test_singular_values_take_the_polynomial(shape: tuple[int, ...], steps: int) -> None:
    given = normal(*shape)
    # small singular values and the rounding errors of large ones grow by 3.4 in a step: 3.4^7 x 1e-16 is 6e-13
    torch.testing.assert_close(
        newton_schulz(given, steps, 1e-3), by_singular_values(given, steps, 1e-3), rtol=0, atol=2e-12
    )


SPECTRA = {
    "alike": torch.ones(64),
    "condition 1e3": torch.logspace(0, -3, 64),
    "condition 1e6": torch.logspace(0, -6, 64),
    "1/i": 1 / torch.arange(1.0, 65),
    "one dwarfs the rest": torch.cat([torch.ones(1), torch.full((63,), 0.05)]),
    "most nearly 0": torch.cat([torch.ones(4), torch.full((60,), 1e-5)]),
    "rank one": torch.cat([torch.ones(1), torch.zeros(63)]),
}


@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_has_the_error_that_is_documented(spectrum: str, columns: int) -> None:
    left, right = (torch.linalg.qr(normal(size, 64, seed=size))[0] for size in (64, columns))
    given = (left * SPECTRA[spectrum].double() @ right.mT).float()
    exact = by_singular_values(given.double(), 5, 0.0)
    error = torch.linalg.norm(newton_schulz(given, 5, 0.0) - exact) / torch.linalg.norm(exact)
    assert error < (2e-4 if spectrum == "rank one" else 1e-4)


def test_strides_do_not_matter() -> None:
    kernels = normal(4, 10, 3, 2).movedim((0, 1), (-2, -1))
    torch.testing.assert_close(newton_schulz(kernels, 5, 1e-8), newton_schulz(kernels.contiguous(), 5, 1e-8))


@pytest.mark.parametrize("shape", [(4, 9), (256, 260)], ids=str)
def test_copies_may_be_mapped_with_an_eps_each(shape: tuple[int, int]) -> None:
    given, eps = normal(3, *shape), torch.tensor([1e-8, 0.1, 2.0], dtype=torch.float64)
    mapped = torch.vmap(lambda matrix, eps: newton_schulz(matrix, 5, eps))(given, eps)
    torch.testing.assert_close(mapped, newton_schulz(given, 5, eps.reshape(3, 1, 1)))


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 5)], ids=str)
def test_gradients_are_those_of_finite_differences(shape: tuple[int, int]) -> None:
    given = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 5, 1e-3), given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: newton_schulz(x, 4, 1e-3), given)


@pytest.mark.parametrize("shape", [(256, 260), (520, 256)], ids=str)
def test_gradients_in_panels_are_those_of_finite_differences(shape: tuple[int, int]) -> None:
    given, weight, along = (normal(*shape, seed=seed) for seed in range(3))

    def value(x: Tensor) -> Tensor:
        return (weight * newton_schulz(x, 4, 1e-3)).sum()

    slope = (torch.func.grad(value)(given) * along).sum()
    # central differences: error of h^2 from the third derivative, and of 1e-16 / h from rounding
    torch.testing.assert_close(
        slope, (value(given + 1e-5 * along) - value(given - 1e-5 * along)) / 2e-5, rtol=1e-6, atol=0
    )


def test_a_zero_matrix_stays_zero() -> None:
    given = normal(2, 3, 8)
    given[0] = 0
    made = newton_schulz(given, 5, 1e-8)
    assert not made[0].any()
    torch.testing.assert_close(made[1], newton_schulz(given[1], 5, 1e-8))


def test_what_is_not_finite_shows_in_its_matrix_alone() -> None:
    given = normal(2, 3, 8)
    given[0, 0, 0] = torch.inf
    made = newton_schulz(given, 5, 1e-8)
    assert made[0].isnan().all()
    torch.testing.assert_close(made[1], newton_schulz(given[1], 5, 1e-8))


# -- NumPy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 7])
@pytest.mark.parametrize("shape", [(256, 256), (2, 256, 530), (2, 530, 260), (300, 320)], ids=str)
def test_numpy_takes_the_polynomial(shape: tuple[int, ...], steps: int) -> None:
    given = normal(*shape)
    made = matrix_cpu.newton_schulz(given, steps, 1e-3)
    torch.testing.assert_close(made, by_singular_values(given, steps, 1e-3), rtol=0, atol=2e-12)  # as above


@pytest.mark.parametrize("columns", [256, 512])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_numpy_in_float32_has_the_error_that_is_documented(spectrum: str, columns: int) -> None:
    left, right = (torch.linalg.qr(normal(size, 256, seed=size))[0] for size in (256, columns))
    values = torch.nn.functional.interpolate(SPECTRA[spectrum].double()[None, None], 256)[0, 0]
    if spectrum == "rank one":
        values[1:] = 0
    given = (left * values @ right.mT).float()
    exact = by_singular_values(given.double(), 5, 0.0)
    made = matrix_cpu.newton_schulz(given, 5, 0.0)
    assert made is not None
    assert torch.linalg.norm(made - exact) / torch.linalg.norm(exact) < (2e-4 if spectrum == "rank one" else 1e-4)


def test_numpy_takes_no_more_threads_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from threadpoolctl import threadpool_info

    seen: list[int] = []
    factor = matrix_cpu._factor

    def watched(gram: np.ndarray) -> np.ndarray:
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return factor(gram)

    monkeypatch.setattr(matrix_cpu, "_factor", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        matrix_cpu.newton_schulz(normal(256, 256), 1, 1e-8)
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_numpy_keeps_what_is_not_finite_to_its_matrix() -> None:
    given = normal(2, 256, 260)
    given[0, 0, 0] = torch.inf
    made = matrix_cpu.newton_schulz(given, 5, 1e-8)
    assert made is not None
    assert made[0].isnan().all()
    torch.testing.assert_close(made[1], newton_schulz(given[1], 5, 1e-8), rtol=0, atol=2e-12)


@pytest.mark.parametrize(
    "given",
    [normal(8, 300), normal(300, 8), normal(256, 256).bfloat16(), normal(0, 256, 256)],
    ids=lambda x: str(x.shape),
)
def test_numpy_leaves_the_rest_to_torch(given: Tensor) -> None:
    assert matrix_cpu.newton_schulz(given, 5, 1e-8) is None


def test_mapped_copies_reach_numpy() -> None:
    given, eps = normal(2, 260, 256), torch.tensor([1e-8, 1.0], dtype=torch.float64)
    with torch.no_grad(), replacing(CppKernels().of_matrices):
        mapped = torch.vmap(lambda x, e: newton_schulz(x, 5, e))(given, eps)
    torch.testing.assert_close(mapped, newton_schulz(given, 5, eps.reshape(2, 1, 1)), rtol=0, atol=2e-12)


def test_steps_of_optimizers_use_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(matrices: Tensor, steps: int, eps: Tensor | float) -> Tensor | None:
        seen.append(tuple(matrices.shape))
        return matrix_cpu.newton_schulz(matrices, steps, eps)

    monkeypatch.setattr(CppKernels, "of_matrices", {"newton_schulz": watched})
    made = []
    for execution in ("plain", "auto"):
        weight = torch.nn.Parameter(normal(256, 300).float())
        weight.grad = torch.sin(7 * weight.detach())
        metaopt.optimizer("muon", [{"params": [("0.weight", weight)], "role": "hidden"}], execution=execution).step()
        made.append(weight.detach())
    assert seen == [(1, 256, 300)]
    torch.testing.assert_close(*made, rtol=0, atol=1e-5)  # a step of size lr, its direction known to 1e-4
