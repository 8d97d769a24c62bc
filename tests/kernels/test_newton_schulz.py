"""Orthogonalised by the kernel as by torch's products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metaopt import matrix, registry
from metaopt.cpp_kernels import CppKernels
from metaopt.replacing import replacing
from metaopt.torch_optimizer import RuleOptimizer
from metaopt.unroll import start, unroll
from metaopt_classic.muon import Muon
from metaopt_kernels.newton_schulz import newton_schulz
from metaopt_learned.celo2 import Celo2

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


# -- reached from rules ------------------------------------------------------------------------------------------------


class MatricesOnly(CppKernels):
    """Of kernels only those of matrices; counts the stacks that they are handed."""

    def __init__(self) -> None:
        self.stacks: list[tuple[int, ...]] = []
        self.of_matrices = {"newton_schulz": self.newton_schulz}

    def newton_schulz(self, matrices: Tensor, steps: int, eps: Tensor | float) -> Tensor | None:
        self.stacks.append(tuple(matrices.shape))
        return newton_schulz(matrices, steps, eps)


def test_muon_hands_stacks_to_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = MatricesOnly()
    monkeypatch.setattr("metaopt.execution.kernels_of", lambda _: kernels)
    shapes = {"0.weight": (8, 6), "1.weight": (8, 6), "2.weight": (20, 70), "bias": (8,)}
    made = []
    for execution in ("plain", "fused"):
        named = [(name, nn.Parameter(matrices(shape, device))) for name, shape in shapes.items()]
        for _, p in named:
            p.grad = torch.sin(7 * p.detach())
        RuleOptimizer(Muon(lr=0.1), [{"params": named, "role": "hidden"}], execution).step()
        made.append([p.detach() for _, p in named])
    assert kernels.stacks == [(2, 8, 6), (1, 20, 70)]  # the second is too wide for the kernel
    for plain, fused in zip(*made, strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-6)


def test_all_copies_of_an_unroll_go_to_the_kernel_at_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Celo2().bind(Celo2().init_theta(torch.Generator().manual_seed(0))).to(device)
    losses = []
    for kernels in (CppKernels(), MatricesOnly()):
        monkeypatch.setattr("metaopt.unroll.kernels_of", lambda _, kernels=kernels: kernels)
        task = registry.create("task", "digits_mlp", device=str(device))  # anew: what steps a task is kept with it
        with torch.no_grad():
            carry = start(task, rule, [0, 1, 2])
            losses.append(unroll(task, rule, carry, 2, hp={"lr": 0.1}, backend="fused")[0])
    assert isinstance(kernels, MatricesOnly)
    assert kernels.stacks == 2 * [(3, 32, 64), (3, 10, 32)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_copies_may_share_the_matrices_or_eps(device: torch.device) -> None:
    given, eps = matrices((3, 2, 8, 5), device), torch.tensor([1e-7, 1.0, 10.0], device=device)
    kernels = MatricesOnly()
    for dims in ((0, 0), (0, None), (1, None), (None, 0)):
        arguments = given, eps if dims[1] == 0 else eps[1]

        def mapped(x: Tensor, e: Tensor) -> Tensor:
            return matrix.newton_schulz(x, 2, e)

        with torch.no_grad(), replacing(kernels.of_matrices):
            made = torch.vmap(mapped, dims)(*arguments)
        torch.testing.assert_close(made, torch.vmap(mapped, dims)(*arguments), rtol=0, atol=1e-5)
    assert len(kernels.stacks) == 4


def test_what_is_recorded_is_the_formula(device: torch.device) -> None:
    kernels = MatricesOnly()
    given = matrices((5, 4), device)
    with replacing(kernels.of_matrices):
        gradient = torch.func.grad(lambda x: matrix.newton_schulz(x, 2, 1e-7).sum())(given)
    assert gradient.abs().max() > 0
    assert not kernels.stacks
