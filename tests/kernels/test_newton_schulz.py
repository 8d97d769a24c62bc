"""Orthogonalised by the kernel as by torch's products."""

from __future__ import annotations

import pytest
import torch

from metaopt import matrix
from metaopt_kernels.newton_schulz import newton_schulz

SHAPES = [(3, 5, 7), (2, 2, 33, 20), (1, 1), (4, 1, 9), (16, 16), (1, 64, 50)]


def matrices(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_float32_products(shape: tuple[int, ...], device: torch.device) -> None:
    given = matrices(shape, device)
    made = newton_schulz(given, 5, 1e-7)
    exact = matrix.newton_schulz(given.double(), 5, 1e-7)
    by_torch = matrix.newton_schulz(given, 5, 1e-7)
    assert made is not None
    assert made.shape == given.shape
    # products sum in another order; 2e-7 is an ulp of the largest entries, which are below 2
    assert (made - exact).abs().max() <= 2e-7 + 3 * (by_torch - exact).abs().max()


def test_tf32_products_serve_larger_matrices(device: torch.device) -> None:
    given = matrices((1, 100, 128), device)
    made = newton_schulz(given, 5, 1e-7, "tf32")
    # 10 bits of mantissa, through five iterations that each enlarge what is small up to 3.4 times
    torch.testing.assert_close(made, matrix.newton_schulz(given, 5, 1e-7), rtol=0, atol=2e-2)


def test_bfloat16_is_rounded_once(device: torch.device) -> None:
    given = matrices((2, 12, 30), device).bfloat16()
    made = newton_schulz(given, 5, 1e-7)
    # where float32 lies within its own error of the middle between two bfloat16, either is right
    torch.testing.assert_close(made, matrix.newton_schulz(given.float(), 5, 1e-7).bfloat16(), rtol=2**-7, atol=0)
    assert isinstance(made, torch.Tensor)
    assert torch.eq(made, matrix.newton_schulz(given.float(), 5, 1e-7).bfloat16()).float().mean() > 0.99


def test_transposed_matrices_need_no_copy(device: torch.device) -> None:
    given = matrices((3, 20, 9), device)
    assert torch.equal(newton_schulz(given.mT, 5, 1e-7), newton_schulz(given.mT.contiguous(), 5, 1e-7))  # type: ignore[arg-type]
    torch.testing.assert_close(newton_schulz(given.mT, 5, 1e-7).mT, newton_schulz(given, 5, 1e-7), rtol=0, atol=0)  # type: ignore[union-attr]


def test_each_copy_may_have_an_eps_of_its_own(device: torch.device) -> None:
    given = matrices((3, 2, 8, 8), device)
    eps = torch.tensor([1e-7, 1.0, 10.0], device=device).reshape(3, 1, 1, 1)
    made = newton_schulz(given, 2, eps)
    torch.testing.assert_close(made, matrix.newton_schulz(given, 2, eps), rtol=0, atol=1e-5)


def test_a_zero_matrix_stays_zero(device: torch.device) -> None:
    made = newton_schulz(torch.zeros(2, 3, 4, device=device), 5, 1e-7)
    assert torch.equal(made, torch.zeros(2, 3, 4, device=device))  # type: ignore[arg-type]


def test_others_are_left_to_torch(device: torch.device) -> None:
    assert newton_schulz(torch.ones(2, 65, 4, device=device), 5, 1e-7) is None
    assert newton_schulz(torch.ones(2, 129, 4, device=device), 5, 1e-7, "tf32") is None
    assert newton_schulz(torch.ones(2, 4, 4, dtype=torch.float64, device=device), 5, 1e-7) is None
    assert newton_schulz(torch.ones(0, 4, 4, device=device), 5, 1e-7) is None
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, got 'bf16'"):
        newton_schulz(torch.ones(4, 4, device=device), 5, 1e-7, "bf16")
