"""The Triton form of per-parameter rules computes what the plain form computes, whatever the features, networks and shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from perparameter_cases import RULES, SHAPES
from torch import Generator, Tensor

from metaopt import tree
from metaopt.perparameter import PerParameterRule
from metaopt.rule import Context, Params, State, infer_info
from metaopt_kernels import network_step
from metaopt_kernels.network_step import PRECISIONS, fused_step, supports
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo2 import Celo2, Celo2Base
from metaopt_learned.mlp_lopt import MLPLOpt
from metaopt_learned.mulo import MuLO
from metaopt_learned.velo import VeLO

pytestmark = [
    # the interpreter also computes what masks leave out
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]

HP = {"lr": 1.0, "weight_decay": 0.1}
LEARNED: dict[str, PerParameterRule] = {
    "mlp_lopt": MLPLOpt(), "celo2_base": Celo2Base(), "celo2": Celo2(), "mulo": MuLO(hidden=16),
    "velo": VeLO(lstm_hidden=8, bank=4), "adafac_64": AdafacMLP(hidden=64),
}  # fmt: skip
ALL = RULES | LEARNED
FEW = {"vector": (21,), "wide": (5, 30), "conv": (4, 3, 2, 2)}

Given = tuple[Any, Params, Params, State]


class Triton:
    """What the rules' executions ask of kernels."""

    reaches = staticmethod(supports)
    network_step = staticmethod(fused_step)


def given(rule: PerParameterRule, k: int, shapes: dict[str, tuple[int, ...]], device: torch.device) -> Given:
    """Theta of every copy, gradients, parameters and a state as after many steps, in float64."""
    generator = Generator().manual_seed(1)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    theta = tree.stack([rule.init_theta(generator) for _ in range(k)])
    theta = {name: value.double() + 0.02 * noise(value.shape) for name, value in theta.items()}
    params = {name: noise((k, *shape)) for name, shape in shapes.items()}
    grads = {name: noise((k, *shape)) for name, shape in shapes.items()}
    info = infer_info({name: p[0] for name, p in params.items()})
    state = torch.vmap(lambda p, theta: rule.init(p, info, theta))(params, theta)
    for slots in state.values():
        for slot in slots.keys() & {"momentum", "rms", "row", "col", "diag"}:
            value = noise(slots[slot].shape)
            slots[slot] = value if slot == "momentum" else value.square()
    theta, grads, params, state = (
        tree.map_tree(lambda v: v.to(device), part) for part in (theta, grads, params, state)
    )
    return theta, grads, params, state


def plain(rule: PerParameterRule, theta: Any, grads: Params, params: Params, state: State) -> tuple[Params, State]:
    """`update` under vmap."""
    info = infer_info({name: p[0] for name, p in params.items()})
    k = len(next(iter(params.values())))

    def update(theta: Any, grads: Params, state: State, params: Params, step: Tensor, loss: Tensor) -> Any:
        return rule.update(theta, grads, state, params, rule.hp | HP, Context(info, step, loss, step + 5))

    return torch.vmap(update)(theta, grads, state, params, *time_of(k, theta))


def fused(rule: PerParameterRule, theta: Any, grads: Params, params: Params, state: State) -> tuple[Params, State]:
    """By kernels."""
    info = infer_info({name: p[0] for name, p in params.items()})
    step, loss = time_of(len(next(iter(params.values()))), theta)
    hp = rule.hp | HP
    done = rule.update_copies(
        Triton(), theta, grads, state, params, hp, Context(info, step, loss, step + 5), (0, dict.fromkeys(hp))
    )
    assert done is not None
    return done


def time_of(k: int, theta: Any) -> tuple[Tensor, Tensor]:
    like = next(iter(theta.values()))
    return torch.arange(k, device=like.device), torch.linspace(0.5, 1.5, k).to(like)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return tree.map_tree(lambda v: v.to(dtype) if v.is_floating_point() else v, value)


def assert_same(got: tuple[Params, State], wanted: tuple[Params, State], start: Params, tolerance: float) -> None:
    """Relative to the largest move of a parameter, and to the largest accumulator."""
    for name, value in wanted[0].items():
        move = (value - start[name]).abs().max()
        error = (got[0][name] - value).abs().max()
        assert error <= tolerance * move, f"{name}: error {error:.1e} of a move {move:.1e}"
        assert got[1][name].keys() == wanted[1][name].keys()
        for slot, accumulator in wanted[1][name].items():
            error = (got[1][name][slot] - accumulator).abs().max()
            assert error <= tolerance * accumulator.abs().max(), (name, slot)


@pytest.fixture
def phase_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch for launch, in spans so small that tensors have several."""
    monkeypatch.setattr(network_step, "ONE_LAUNCH", 0)
    monkeypatch.setattr(network_step, "MANY_COPIES", 1 << 30)
    monkeypatch.setattr(network_step, "SPAN", 512)


EXACT = 1e-10  # the rounding of some thousand operations


@pytest.mark.parametrize("name", ALL)
def test_it_is_the_plain_update(name: str, device: torch.device) -> None:
    problem = given(ALL[name], 1, FEW, device)
    assert_same(fused(ALL[name], *problem), plain(ALL[name], *problem), problem[2], EXACT)


def test_it_is_the_plain_update_for_all_shapes(device: torch.device) -> None:
    rule = RULES["adafac_4"]
    problem = given(rule, 1, SHAPES, device)
    assert_same(fused(rule, *problem), plain(rule, *problem), problem[2], EXACT)


@pytest.mark.usefixtures("phase_by_phase")
@pytest.mark.parametrize("name", ["adafac_32", "momenta_only"])
def test_it_is_the_plain_update_phase_by_phase(name: str, device: torch.device) -> None:
    problem = given(ALL[name], 2, {"vector": (700,), "matrix": (21, 30), "conv": (6, 5, 3, 7)}, device)
    assert_same(fused(ALL[name], *problem), plain(ALL[name], *problem), problem[2], EXACT)


@pytest.mark.parametrize("name", ["adafac_4", "adafac_32"])
def test_it_is_the_plain_update_in_single_precision(name: str, device: torch.device) -> None:
    problem = given(ALL[name], 3, {"vector": (10,), "wide": (5, 12)}, device)
    theta, grads, params, state = (cast(part, torch.float32) for part in problem)
    got = fused(ALL[name], theta, grads, params, state)
    # 1 - decay is what is left of decays near 1, to 6e-5; parameters round
    assert_same(got, plain(ALL[name], *problem), problem[2], 2e-4)


def test_a_copy_does_not_see_the_others(device: torch.device) -> None:
    rule = RULES["adafac_32"]
    theta, grads, params, state = given(rule, 3, {"vector": (10,), "wide": (5, 12)}, device)
    together = fused(rule, theta, grads, params, state)
    for grad in grads.values():
        grad[1] = math.nan
    beside_nan = fused(rule, theta, grads, params, state)
    for part, wanted in zip(beside_nan, together, strict=True):
        for a, b in zip(tree.leaves(part), tree.leaves(wanted), strict=True):
            assert torch.equal(a[::2], b[::2])
    assert all(p[1].isnan().all() for p in beside_nan[0].values())


@pytest.mark.parametrize("name", ["adafac_4", "matrices"])
def test_in_place_is_out_of_place(name: str, device: torch.device) -> None:
    rule = RULES[name]
    theta, grads, params, state = given(rule, 1, FEW, device)
    info = infer_info({name: p[0] for name, p in params.items()})
    own = (tree.index(part, 0) for part in (theta, state, params))
    prepared = rule.prepare(*own, HP, Context(info)).map(lambda v: v.unsqueeze(0))
    apart = fused_step(rule.kernel_step, prepared, grads, params, state)
    kept = tree.map_tree(torch.clone, params)
    inside = fused_step(rule.kernel_step, prepared, grads, params, state, in_place=True)
    assert apart is not None and inside is not None
    for parameter, value in apart[0].items():
        assert torch.equal(params[parameter], value) and not torch.equal(kept[parameter], value)
        for slot, accumulator in apart[1][parameter].items():
            assert torch.equal(state[parameter][slot], accumulator)


def test_what_it_does_not_know_is_left_to_the_plain_form(device: torch.device) -> None:
    features, like = RULES["everything"].features, torch.zeros((), device=device)
    assert supports(features, (3, 4), like) and supports(features, (1_000_000, 1), like.bfloat16())
    assert supports(features, (1 << 33,), like) and supports(features, (1 << 17, 1 << 16), like)
    assert not supports(features, (1 << 31, 1), like)
    assert not supports(features, (3, 0), like)
    assert not supports(features, (3, 4), like.to(torch.int32))
    assert not supports(features, (3, 4), like.to("meta"))
    assert not supports(replace(features, bias_correction=True), (3, 4), like)


def test_an_unknown_precision_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3, bf16, got 'fp8'"):
        fused_step(RULES["adafac_4"].kernel_step, Any, {}, {}, {}, precision="fp8")  # type: ignore[arg-type]
    assert len(PRECISIONS) == 4
