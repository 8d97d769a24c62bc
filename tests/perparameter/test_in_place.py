"""A step in place computes what the plain update computes, by C++ and by chunks, whatever the parameters look like."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from perparameter_cases import FACTORED, RULES, SHAPES, Synthetic
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import tree
from metaopt.kernels import kernels_of
from metaopt.learned import Theta
from metaopt.perparameter import Features, PerParameterRule, chunked
from metaopt.perparameter.chunked import parts_of
from metaopt.perparameter.in_place import step_in_place
from metaopt.program import compiler
from metaopt.rule import Context, Params, State, compute_dtype, infer_info
from metaopt_learned import recurrent
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo import Celo
from metaopt_learned.velo import VeLO

HP = {"lr": 1.0, "weight_decay": 0.1}
MANY_CHUNKS = 16


class Corrected(Synthetic):
    """Bias correction, which C++ leaves to the chunks."""

    seen = Features(("g", "m", "v", "m_r", *FACTORED), 2, 1, 2, bias_correction=True)


class ByMatrix(Synthetic):
    """A mean square for each position of a kernel."""

    seen = Features(("g", "p", "m", *FACTORED), 1, 1, 1, norm="matrix")


ALL: dict[str, PerParameterRule] = {
    **RULES, "corrected": Corrected(), "by_matrix": ByMatrix(), "velo": VeLO(lstm_hidden=8, bank=4),
}  # fmt: skip
EXECUTIONS = ["chunks", pytest.param("fused", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))]


def problem(rule: PerParameterRule, dtype: torch.dtype) -> tuple[Theta, Params, list[Params]]:
    """Theta none of which is zero, parameters of all shapes, and gradients of four steps, some zero, some clipped."""
    generator = Generator().manual_seed(1)
    theta = {
        name: v + 0.02 * torch.randn(v.shape, generator=generator) for name, v in rule.init_theta(generator).items()
    }
    shapes = {**SHAPES, "empty": (0,), "no_rows": (0, 3)}
    params = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    grads = [
        {name: (scale * torch.randn(p.shape, generator=generator)).to(dtype) for name, p in params.items()}
        for scale in (1.0, 0.0, 10.0, 1e-3)
    ]
    return {name: v.to(compute_dtype(dtype)) for name, v in theta.items()}, params, grads


def plainly(rule: PerParameterRule, theta: Theta, params: Params, grads: list[Params]) -> tuple[Params, State]:
    info = infer_info(params)
    state = rule.init(params, info, theta)
    for t, now in enumerate(grads):
        ctx = Context(info, loss=torch.tensor(1.0 / (1 + t)), horizon=20)
        params, state = rule.update(theta, now, state, params, HP, ctx)
    return params, state


def in_place(
    rule: PerParameterRule, theta: Theta, params: Params, grads: list[Params], execution: str
) -> tuple[Params, State]:
    """The same; ``params`` are overwritten."""
    info = infer_info(params)
    state = rule.init(params, info, theta)
    for t, now in enumerate(grads):
        ctx = Context(info, loss=torch.tensor(1.0 / (1 + t)), horizon=20)
        step_in_place(
            rule, theta, now, state, params, HP, ctx, kernels=kernels_of("cpu") if execution == "fused" else None
        )
        state = {name: {**slots, "step": slots["step"] + 1} for name, slots in state.items()}
    return params, state


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ALL)
def test_it_is_the_plain_update(name: str, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_CHUNK", MANY_CHUNKS)
    rule = ALL[name]
    theta, start, grads = problem(rule, torch.float64)
    wanted, state = plainly(rule, theta, start, grads)
    got, new_state = in_place(rule, theta, tree.map_tree(torch.clone, start), grads, execution)
    for key, value in wanted.items():
        # the rounding of some thousand operations; a root of a mean square multiplies that of a small one
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)
        assert new_state[key].keys() == state[key].keys()
        for slot, slot_value in state[key].items():
            torch.testing.assert_close(new_state[key][slot], slot_value, rtol=1e-10, atol=1e-14)
        assert not value.numel() or not torch.equal(value, start[key])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["own_finish", "velo"])
def test_a_rounded_parameter_is_computed_wide_and_rounded_once(name: str, execution: str) -> None:
    theta, start, grads = problem(ALL[name], torch.bfloat16)
    for now in grads:
        exact, _ = plainly(ALL[name], theta, tree.map_tree(Tensor.float, start), [now])
        got, state = in_place(ALL[name], theta, tree.map_tree(torch.clone, start), [now], execution)
        for key, value in exact.items():
            # half an ulp of bfloat16 and what float32 rounding may push over
            torch.testing.assert_close(got[key].float(), value, rtol=2**-8, atol=1e-6)
            assert got[key].dtype == torch.bfloat16
            assert {v.dtype for v in state[key].values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["everything", "own_finish"])
def test_parameters_of_any_strides_are_stepped_where_they_are(name: str, execution: str) -> None:
    """Channels-last convolutions, transposed weights and slices of a flat buffer."""
    rule = ALL[name]
    theta, start, grads = problem(rule, torch.float64)
    flat = torch.cat([start["vector"], start["vector"]])
    views = {
        "conv": start["conv"].clone().to(memory_format=torch.channels_last),
        "wide": start["wide"].T.contiguous().T,
        "vector": flat[::2],
    }
    theirs = [{name: now[name] for name in views} for now in grads]
    expected, _ = plainly(rule, theta, tree.map_tree(torch.clone, views), theirs)
    got, _ = in_place(rule, theta, dict(views), theirs, execution)
    for key, value in expected.items():
        torch.testing.assert_close(views[key], value, rtol=1e-10, atol=1e-12)
        assert got[key] is views[key]
    assert torch.equal(flat[::2], views["vector"]) and torch.equal(flat[1::2], torch.cat([start["vector"]] * 2)[1::2])


class LargestMade(TorchDispatchMode):
    """Records how many elements the largest tensor has that operations allocate."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.elements = known, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rule", [AdafacMLP(hidden=32), Celo(phase=1), VeLO(lstm_hidden=8, bank=4)], ids=lambda r: type(r).__name__
)
def test_what_exists_at_once_is_bounded_by_the_chunk(
    rule: PerParameterRule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain form makes some hundred bytes for each element of a tensor."""
    monkeypatch.setattr(chunked, "CPU_CHUNK", 512)
    monkeypatch.setattr(recurrent, "_PIECE", 512)
    theta = rule.init_theta(Generator().manual_seed(0))
    params, grads = ({"w": torch.randn(300, 200, dtype=dtype), "b": torch.randn(60_000, dtype=dtype)} for _ in range(2))
    info = infer_info(params)
    state = rule.init(params, info, theta)
    known = {value.untyped_storage().data_ptr() for part in (params, grads, state) for value in tree.leaves(part)}
    with LargestMade(known) as made:
        ctx = Context(info, loss=torch.tensor(1.0), horizon=20)
        step_in_place(rule, theta, grads, state, params, HP, ctx, kernels=None)
    assert 0 < made.elements <= 512 * max(rule.features.count((1, 1)), 32)


@given(shape=st.lists(st.integers(1, 7), max_size=4).map(tuple), most=st.integers(1, 60))
def test_parts_cover_every_element_once(shape: tuple[int, ...], most: int) -> None:
    count = torch.zeros(shape)
    for part in parts_of(shape, most):
        assert 0 < count[part].numel() <= most
        count[part] += 1
    assert torch.equal(count, torch.ones(shape))
    assert len(parts_of(shape, most)) >= math.prod(shape) / most


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": ("g", "momentum")}, "a block must be one of g, .*, got 'momentum'"),
        ({"momentum": 0}, "block 'm' is made of momentum accumulators; set momentum to at least 1"),
        ({"norm": "row"}, "norm must be one of tensor, matrix, got 'row'"),
        ({"layout": "numpy"}, "layout must be one of torch, jax, got 'numpy'"),
    ],
)
def test_features_that_do_not_exist_are_refused_when_they_are_declared(wrong: dict[str, Any], message: str) -> None:
    given = {"blocks": ("g", "m"), "momentum": 1, "rms": 0, "factored": 0}
    Features(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Features(**given | wrong)  # type: ignore[arg-type]
