"""Layers inside `Replayable` compute what torch's do, and draw from a key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from metaopt.random import hash64
from metaopt.replayable import Replayable

KEY = hash64(torch.tensor(1))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("layer", "shape", "axes"), [
    (nn.Dropout, (200, 200), ()), (nn.Dropout1d, (200, 50, 3), (2,)), (nn.Dropout2d, (200, 50, 3, 3), (2, 3)),
    (nn.Dropout3d, (200, 50, 2, 2, 2), (2, 3, 4)),
])  # fmt: skip
def test_dropout_zeroes_the_asked_share_and_keeps_the_mean(p: float, layer: Any, shape: Any, axes: Any) -> None:
    module, x = layer(p), torch.ones(shape)
    with Replayable(KEY):
        y, again = module(x), module(x)
        untouched = module.eval()(x)
    kept = (y != 0).float().mean(axes) if axes else (y != 0).float()
    assert bool(((kept == 0) | (kept == 1)).all()), "whole channels"
    assert float(kept.mean()) == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / kept.numel()) + 1e-6)
    if p < 1:
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
        assert not torch.equal(y, again), "every call has its own mask"
    assert torch.equal(untouched, x)


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "float", "blind row"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_is_that_of_torch(mask: str, grouped: bool) -> None:
    query, (key, value) = numbers(2, 4, 5, 8), (numbers(2, 2 if grouped else 4, 5, 8, seed=s) for s in (1, 2))
    boolean = (numbers(5, 5, seed=3) > 0) | torch.eye(5, dtype=torch.bool)
    blind = boolean & (torch.arange(5) != 2)[:, None]
    masks = {"boolean": boolean, "float": numbers(5, 5, seed=4), "blind row": blind}
    arguments = {"attn_mask": masks.get(mask), "is_causal": mask == "causal", "enable_gqa": grouped, "scale": 0.3}

    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **arguments)  # type: ignore[arg-type]

    inputs = [x.requires_grad_() for x in (query, key, value)]
    expected = of(*inputs)
    with Replayable(None):
        found = of(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    sides = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-5)


RECURRENT: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "projected": lambda *a, **k: nn.LSTM(*a, proj_size=2, **k),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(
    "arguments", [{}, {"batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True}]
)
def test_recurrent_layers_are_those_of_torch(kind: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = RECURRENT[kind](3, 4, **arguments), numbers(5, 2, 3)
    expected, state = module(x)
    with Replayable(None):
        found, own_state = module(x)
        own_next, _ = module(x, own_state)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_state, state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_next, module(x, state)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)]
)
def test_recurrent_cells_are_those_of_torch(make: Callable[..., nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    module, x = make(3, 4, bias=bias), numbers(2, 3)
    expected = module(x, module(x))
    with Replayable(None):
        found = module(x, module(x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dropout", "shape"), [(nn.Dropout1d, (40, 6)), (nn.Dropout3d, (40, 2, 3, 2))])
def test_channels_of_an_example_without_a_batch_are_dropped_whole(dropout: Any, shape: tuple[int, ...]) -> None:
    with Replayable(torch.tensor(7)):
        kept = dropout(0.5)(torch.ones(shape)).flatten(1)
    assert torch.equal(kept.amin(1), kept.amax(1)) and 0 < float(kept.mean()) < 2
