"""The recurrent learned optimizers compute what the JAX originals compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import assert_trajectory_close, load, torch_optim_trajectory, under
from torch import Tensor

import metaopt
from metaopt import tree
from metaopt.cpp_kernels import CppKernels
from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import PerParameterRule
from metaopt.rule import Context, Params, infer_info
from metaopt_learned.celo import Celo, CeloAdam
from metaopt_learned.nn_adam import NNAdam
from metaopt_learned.rnn_mlp import RNNMLP
from metaopt_learned.velo import VeLO

VELO = {"lstm_hidden": 64, "bank": 32, "layout": "jax"}
RULES: dict[str, LearnedRule] = {
    "hyperv2_released": VeLO(**VELO),
    "hyperv2_classdefault": VeLO(**VELO, short_loss_memory=True),
    "hyperv2_oldcheckpoint": VeLO(**VELO, short_loss_memory=True, forgetful=True),
    "celo_velo_s": VeLO(**VELO, mixing_scale=1.0),
    "celo_phase1": Celo(phase=1, layout="jax"),
    "celo_phase2": Celo(layout="jax"),
    "celo_trained": Celo(layout="jax"),
    "celo_adam": CeloAdam(),
    "celo_adam_trained": CeloAdam(),
    "rnn_mlp_lopt": RNNMLP(layout="jax"),
    "nn_adam": NNAdam(),
    "nn_adam_decay": NNAdam(decay_strength=0.1),
}
TRAINED = Path(__file__).parents[2].parent / "shared" / "golden"
HORIZON = 100


def theta_of(name: str, dtype: torch.dtype) -> Theta:
    """Theta in our names; trained weights lie beside the repository."""
    arrays, meta = load(name)
    source = meta["main"].get("theta", "").partition(" ")[0]
    if source.endswith("_trained_theta.npz"):
        if not (TRAINED / source).is_file():
            pytest.skip(f"the trained weights {source} are not in {TRAINED}")
        with np.load(TRAINED / source) as file:
            given = {key: torch.from_numpy(file[key]).to(dtype) for key in file.files}
    else:
        given = under(load(source.removesuffix(".npz"))[0] if source else arrays, "theta", dtype)
    rule = RULES[name] if name in RULES else RULES["rnn_mlp_lopt"]
    return rule.theta_from_original(given)


def inputs_of(edge: str, dtype: torch.dtype) -> tuple[Params, Params, Tensor]:
    """Parameters, gradients [steps, ...] and losses [steps]."""
    given, _ = load("learned_inputs_edge" if edge else "learned_inputs")
    return under(given, "params0", dtype), under(given, "grads", dtype), torch.from_numpy(given["losses"]).to(dtype)


def assert_as_original(name: str, edge: str, got: list[Params], start: Params, dtype: torch.dtype) -> None:
    arrays, meta = load(name)
    wanted = under(arrays, f"{edge}params64" if dtype == torch.float64 else f"{edge}params", dtype)
    errors = meta["edge" if edge else "main"]["float32_vs_float64"]
    for tensor in start:
        values = torch.stack([params[tensor] for params in got])
        if dtype == torch.float64:
            assert_trajectory_close(values, wanted[tensor], start[tensor], of_move=1e-10, of_size=1e-14)
        else:  # ten times the original's own float32 error
            assert (values - wanted[tensor]).abs().max() <= 10 * errors[tensor]["max_abs_diff"], tensor


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("edge", ["", "edge/"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trajectory_agrees_with_the_jax_original(name: str, edge: str, dtype: torch.dtype) -> None:
    params, grads, losses = inputs_of(edge, dtype)
    rule = RULES[name].bind(theta_of(name, dtype))
    info, start, got = infer_info(params), params, []
    state = rule.init(params, info)
    for t, loss in enumerate(losses):
        ctx = Context(info, loss=loss, horizon=HORIZON)
        params, state = rule.update({n: g[t] for n, g in grads.items()}, state, params, rule.hp, ctx)
        got.append(params)
    assert_as_original(name, edge, got, start, dtype)


EXECUTIONS = [  # rules without a per-parameter network have but one
    (name, execution, dtype)
    for name, rule in RULES.items()
    for execution, dtype in [
        ("plain", torch.float64), ("foreach", torch.float64), ("fused", torch.float64), ("fused", torch.float32)
    ]
    if execution == "plain" or isinstance(rule, PerParameterRule)
]  # fmt: skip


@pytest.mark.parametrize(("name", "execution", "dtype"), EXECUTIONS)
@pytest.mark.parametrize("edge", ["", "edge/"])
def test_torch_optimizer_follows_the_same_trajectory(name: str, edge: str, execution: Any, dtype: torch.dtype) -> None:
    start, grads, losses = inputs_of(edge, dtype)
    rule = RULES[name].bind(theta_of(name, dtype))
    found = torch_optim_trajectory(rule, start, grads, execution, losses, HORIZON)
    got = [tree.index(found, t) for t in range(len(losses))]
    assert_as_original(name, edge, got, start, dtype)


@pytest.mark.parametrize("edge", ["", "edge/"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_validation_losses_reach_rnn_mlp_as_in_the_original(edge: str, dtype: torch.dtype) -> None:
    params, grads, losses = inputs_of(edge, dtype)
    learned = RULES["rnn_mlp_lopt"]
    assert isinstance(learned, RNNMLP)
    rule = learned.bind(theta_of("rnn_mlp_lopt_valid", dtype))
    _, meta = load("rnn_mlp_lopt_valid")
    info, start, got = infer_info(params), params, []
    state = rule.init(params, info)
    for t, loss in enumerate(losses):
        if t in meta["edge" if edge else "main"]["valid_steps"]:
            state = learned.with_validation_loss(state, loss)
        else:
            params, state = rule.update(
                {n: g[t] for n, g in grads.items()}, state, params, rule.hp, Context(info, loss=loss)
            )
        got.append(params)
    assert_as_original("rnn_mlp_lopt_valid", edge, got, start, dtype)


@pytest.mark.parametrize("name", ["hyperv2_released", "celo_phase2", "celo_adam", "rnn_mlp_lopt", "nn_adam"])
def test_zero_tensors_leave_the_float32_meta_gradient_finite(name: str) -> None:
    """Differentiated through the gradients too, as a full unroll does: roots of zero accumulators have infinite slopes."""
    theta = {key: value.requires_grad_() for key, value in theta_of(name, torch.float32).items()}
    rule = RULES[name].bind(theta)
    params = {"bias": torch.zeros(3), "dead": torch.ones(2), "weight": torch.eye(3)}
    info = infer_info(params)
    state = rule.init(params, info)
    for _ in range(4):
        grads = {"bias": 0 * params["bias"], "dead": 0 * params["dead"], "weight": params["weight"] - 2}
        ctx = Context(info, loss=params["weight"].square().sum(), horizon=HORIZON)
        params, state = rule.update(grads, state, params, rule.hp, ctx)
    outcome = sum(value.sum() for value in params.values())
    assert isinstance(outcome, Tensor)
    found = torch.autograd.grad(outcome, list(theta.values()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found)
    assert any(gradient is not None and gradient.any() for gradient in found)


def test_parameters_without_gradient_take_no_part() -> None:
    """A frozen tensor changes neither itself nor the step of the others; thawed, it starts with a history of its own."""
    theta = theta_of("hyperv2_released", torch.float32)
    rule = RULES["hyperv2_released"].bind(theta)
    runs = []
    for names in (("a", "b"), ("a", "b", "frozen")):
        params = {name: torch.nn.Parameter(torch.full((3, 2), 0.5)) for name in names}
        optimizer = metaopt.optimizer(rule, params.items(), horizon=HORIZON)
        for t in range(4):
            for name in ("a", "b"):
                params[name].grad = torch.full((3, 2), 0.1 * (t + 1))
            optimizer.step(loss=1.0 / (t + 1))
        runs.append(params["a"].detach().clone())
    assert torch.equal(*runs)
    assert torch.equal(params["frozen"], torch.full((3, 2), 0.5)) and params["frozen"] not in optimizer.state
    params["frozen"].grad = torch.ones(3, 2)
    optimizer.step(loss=0.1)
    assert not torch.equal(params["frozen"], torch.full((3, 2), 0.5)) and optimizer.state[params["frozen"]]["step"] == 1


@pytest.mark.parametrize("name", ["hyperv2_released", "celo_phase1", "celo_phase2"])
@pytest.mark.parametrize("edge", ["", "edge/"])
def test_copies_in_cpp_follow_the_same_trajectory(name: str, edge: str) -> None:
    start, grads, losses = inputs_of(edge, torch.float64)
    learned, theta, info = RULES[name], theta_of(name, torch.float64), infer_info(start)
    assert isinstance(learned, PerParameterRule)
    params, copied = (tree.map_tree(lambda value: torch.stack([value] * 2), part) for part in (start, theta))
    if not learned.fuses(CppKernels(), params, info):
        pytest.skip("no C++ compiler")
    state = torch.vmap(lambda p, theta: learned.init(p, info, theta))(params, copied)
    got = []
    for t, loss in enumerate(losses):
        both = {tensor: torch.stack([grad[t]] * 2) for tensor, grad in grads.items()}
        ctx = Context(info, torch.full((2,), t), loss.expand(2), torch.full((2,), HORIZON))
        with torch.no_grad():
            updated = learned.update_copies(
                CppKernels(), copied, both, state, params, learned.hp, ctx, (0, {"lr": None})
            )
        assert updated is not None
        params, state = updated
        got.append(tree.index(params, 1))
    assert_as_original(name, edge, got, start, torch.float64)
