"""Newton-Schulz iterations against what they do to singular values: short and long matrices, whole products and panels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaopt.matrix import QUINTIC, newton_schulz

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
