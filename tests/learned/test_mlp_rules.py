"""What the golden vectors of the MLP-type learned optimizers leave open: torch's layout, roles, decay."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from golden_vectors import load, torch_optim_trajectory, under
from test_mlp_rules_golden import RULES, functional, theta_of
from torch import Tensor, nn

import metaopt
from metaopt import tree
from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, Params, infer_info
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo2 import Celo2, Celo2Base
from metaopt_learned.mlp_lopt import MLPLOpt
from metaopt_learned.mlp_nominal import MLPNominal
from metaopt_learned.mulo import MuLO


def to_torch(value: Tensor, first: int = 0) -> Tensor:
    """(*kernel, in, out) -> (out, in, *kernel), after ``first`` leading dimensions."""
    if value.dim() - first < 2:
        return value
    kernel = range(first, value.dim() - 2)
    return value.permute(*range(first), -1, -2, *kernel).contiguous()


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "layout" in rule.declared()])
@pytest.mark.parametrize("inputs", ["learned_inputs", "learned_inputs_edge"])
@pytest.mark.parametrize("execution", ["functional", "fused"])
def test_torch_layout_is_the_original_transposed(name: str, inputs: str, execution: Any) -> None:
    """Also where sizes tie. float64; sums run in another order. C++ knows norms by matrix of kernels in torch's layout only."""
    given, _ = load(inputs)
    start, grads = under(given, "params0"), under(given, "grads")
    theta = theta_of(name, torch.float64)
    theirs = functional(RULES[name].bind(theta), start, grads)
    transposed = tree.map_tree(to_torch, start), tree.map_tree(lambda grad: to_torch(grad, 1), grads)
    rule = RULES[name].replaced(layout="torch").bind(theta)
    run = functional if execution == "functional" else partial(torch_optim_trajectory, execution=execution)
    for tensor, values in run(rule, *transposed).items():
        torch.testing.assert_close(values, to_torch(theirs[tensor], 1), rtol=1e-10, atol=1e-12)


def one_step(rule: LearnedRule, theta: Theta, params: Params, grads: Params, **roles: str) -> Params:
    info = infer_info(params, roles)
    state = rule.init(params, info, theta)
    return rule.update(theta, grads, state, params, rule.hp, Context(info))[0]


def example(*shapes: tuple[int, ...]) -> tuple[Params, Params]:
    """Parameters and gradients of these shapes."""
    generator = torch.Generator().manual_seed(0)
    names = [f"p{i}" for i in range(len(shapes))]
    params, grads = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
    return dict(zip(names, params, strict=True)), dict(zip(names, grads, strict=True))


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (MuLO(), {"hidden": 1 / 6, "input": 1.0, "output": 1.0, "embedding": 1.0}),
        (
            MuLO(output="weights", hidden_multiplier=3.0),
            {"hidden": 3 / 6, "input": 1.0, "output": 1 / 6, "embedding": 1.0},
        ),
    ],
)
def test_mulo_divides_steps_by_fan_in_where_the_role_says_so(rule: MuLO, factor: dict[str, float]) -> None:
    theta = tree.map_tree(Tensor.double, rule.init_theta(torch.Generator().manual_seed(0)))
    params, grads = example((5, 6), (5, 6), (5, 6), (5, 6))
    roles = dict(zip(params, factor, strict=True))
    plain = one_step(AdafacMLP(hidden=32, step_scale=0.01), theta, params, grads)
    scaled = one_step(rule, theta, params, grads, **roles)
    for name, p in params.items():
        torch.testing.assert_close(scaled[name] - p, (plain[name] - p) * factor[roles[name]], rtol=1e-9, atol=1e-14)


def test_a_nominal_step_relative_to_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step_scale must not be 0 with a nominal term"):
        MLPNominal(step_scale=0.0, nominal_scale=0.1)


def test_mulo_reads_an_entry_that_is_not_a_number_as_zero() -> None:
    rule = MuLO()
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    params, grads = example((5, 6))
    broken, zeroed = grads["p0"].clone(), grads["p0"].clone()
    broken[2, 3], zeroed[2, 3] = torch.nan, 0.0
    assert torch.equal(
        one_step(rule, theta, params, {"p0": broken})["p0"], one_step(rule, theta, params, {"p0": zeroed})["p0"]
    )


def test_features_follow_options_that_are_replaced() -> None:
    rule = AdafacMLP()
    assert rule.features.layout == "torch"
    assert rule.replaced(layout="jax").features.layout == "jax", "a stale one would mistake inputs for outputs"


def test_parameters_of_one_step_count_share_one_network() -> None:
    """In ``torch.optim`` each parameter has a count of its own; time features are made once for those that agree."""
    rule = AdafacMLP()
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    params, _ = example((2, 3), (3,), (4,))
    now, earlier = torch.tensor(7), torch.tensor(3)
    state = {name: {"step": step} for name, step in zip(params, (now, now, earlier), strict=True)}
    layers = rule.prepare(theta, state, params, rule.hp, Context(infer_info(params))).layers
    assert layers["p0"] is layers["p1"]
    assert not torch.equal(layers["p0"][0][1], layers["p2"][0][1])


@pytest.mark.parametrize("rule", [AdafacMLP(), MLPLOpt()])
def test_weight_decay_is_decoupled_and_times_lr(rule: LearnedRule) -> None:
    """With an output layer of zeros nothing else is left of the step."""
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    theta["w2"].zero_()
    params, grads = example((4, 3), (3,))
    moved = one_step(rule.replaced(lr=0.5, weight_decay=0.1), theta, params, grads)
    for name, p in params.items():
        torch.testing.assert_close(moved[name], 0.95 * p)


def test_celo2_moves_matrices_by_lr_and_leaves_embeddings_and_vectors_to_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    rule = Celo2()
    optimizer = metaopt.optimizer(rule.bind(rule.init_theta(torch.Generator().manual_seed(0))), model, lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        move = p.detach() - before[name]
        if p.dim() == 2 and name != "0.weight":
            assert set(optimizer.state[p]) == {"step", "momentum", "rms", "row", "col"}
            torch.testing.assert_close(move.square().mean().sqrt().item(), 1e-3, rtol=1e-6, atol=0)
        else:  # AdamW without bias correction at its first step: m / sqrt(v) = 0.1 / sqrt(0.05)
            assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
            grad = p.grad
            assert grad is not None
            want = -0.02 * 0.1 * grad / (0.05 * grad * grad + 1e-8).sqrt()
            torch.testing.assert_close(move, want, rtol=1e-6, atol=1e-12)


def test_celo2_orthogonalises_each_position_of_a_kernel_by_itself() -> None:
    """Singular values of each matrix of the step lie within a factor of two or so of each other."""
    rule = Celo2()
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    params, grads = example((6, 4, 3, 3))
    move = (one_step(rule, theta, params, grads)["p0"] - params["p0"]).movedim((0, 1), (-2, -1))
    torch.testing.assert_close(move.square().mean((-2, -1)).sqrt(), torch.full((3, 3), 1e-3, dtype=move.dtype))
    values = torch.linalg.svdvals(move)
    assert (values[..., 0] <= 2.5 * values[..., -1]).all()
    without = one_step(Celo2Base(), theta, params, grads)["p0"] - params["p0"]
    spread = torch.linalg.svdvals(without.movedim((0, 1), (-2, -1)))
    assert (spread[..., 0] > 2.5 * spread[..., -1]).any(), "else the test above says nothing"
