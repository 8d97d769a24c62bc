"""Statistics of tensors that recurrent learned optimizers see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt.rule import Context, infer_info
from metaopt_learned import recurrent
from metaopt_learned.recurrent import mean_squares
from metaopt_learned.velo import VeLO


@pytest.mark.parametrize("function", [recurrent._moments_by_pieces, recurrent._moments_at_once])
def test_moments_are_those_of_numpy(
    function: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One form is for CPUs, the other for GPUs, of which CI has none."""
    monkeypatch.setattr(recurrent, "_PIECE", 5)
    generator = Generator().manual_seed(0)
    # far from zero, where a mean of squares less the square of the mean would be wrong in all digits
    tensors = [1e6 + torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (1, 5, 17, 0)]
    mean, var = function(tensors)
    for i, x in enumerate(tensors[:-1]):
        np.testing.assert_allclose(mean[i], x.numpy().mean(1), rtol=1e-14)
        np.testing.assert_allclose(var[i], x.numpy().var(1), rtol=1e-9, atol=0)
    assert not mean[-1].any() and not var[-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_squares_are_those_of_numpy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_PIECE", 5)
    tensors = [
        torch.randn(shape, generator=Generator().manual_seed(0)).to(dtype) for shape in ((), (17,), (3, 4), (0,))
    ]
    wanted = [float(np.square(x.double().numpy()).mean()) for x in tensors[:-1]]
    np.testing.assert_allclose(mean_squares(tensors), [*wanted, 0.0], rtol=1e-6)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def test_the_hypernetwork_of_velo_runs_once_for_all_tensors() -> None:
    rule = VeLO(lstm_hidden=8, bank=4)
    theta = rule.init_theta(Generator().manual_seed(0))
    counts = []
    for tensors in (2, 20):
        params = {f"{i}.weight": torch.ones(i + 1, 3) for i in range(tensors)}
        info = infer_info(params)
        with Products() as products:
            rule.prepare(
                theta, rule.init(params, info, theta), params, rule.hp, Context(info, loss=torch.ones(()), horizon=9)
            )
        counts.append(products.count)
    # mixing, input and gates of the LSTM, its two heads, and three layers' weights and biases
    assert counts == [11, 11]
