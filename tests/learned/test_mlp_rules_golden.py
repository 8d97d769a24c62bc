"""The learned optimizers with a per-parameter MLP compute what the JAX originals compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import assert_trajectory_close, load, torch_optim_trajectory, under
from torch import Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, Params, UpdateRule, infer_info
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo2 import Celo2, Celo2Base
from metaopt_learned.mlp_lopt import MLPLOpt
from metaopt_learned.mlp_nominal import MLPNominal

CONTROLLED: dict[str, Any] = {
    "nominal_scale": 1e-3, "weight_decay": 0.01, "control_nominal": True, "control_decay": True,
    "nominal_magnitude_scale": 0.1, "decay_magnitude_scale": 0.1, "layout": "jax",
}  # fmt: skip
RULES: dict[str, LearnedRule] = {
    "adafac_mlp_lopt_h4": AdafacMLP(hidden=4, layout="jax"),
    "adafac_mlp_lopt_h32": AdafacMLP(hidden=32, layout="jax"),
    "mlp_lopt": MLPLOpt(),
    "mlp_nom_lopt_default": MLPNominal(layout="jax"),
    "mlp_nom_lopt_controlled": MLPNominal(**CONTROLLED),
    "mlp_nom_lopt_aggregated": MLPNominal(
        **CONTROLLED, nominal="adam", mean_magnitude=True, mean_nominal_magnitude=True, rescale=True
    ),
    "celo2base": Celo2Base(layout="jax"),
    "celo2base_wd": Celo2Base(
        magnitude_scale=0.1, param_scale=True, bias_correction=True, weight_decay=0.1, layout="jax"
    ),
    "celo2": Celo2(layout="jax"),
    "celo2_wd": Celo2(weight_decay=0.1, adam_bias_correction=True, layout="jax"),
}


def theta_of(name: str, dtype: torch.dtype) -> Theta:
    arrays, meta = load(name)
    if "theta" in meta["main"]:  # in another file
        arrays, _ = load(meta["main"]["theta"].removesuffix(".npz"))
    return RULES[name].theta_from_original(under(arrays, "theta", dtype))


def functional(rule: UpdateRule, start: Params, grads: Params) -> dict[str, Tensor]:
    """Parameters after every update [steps, ...]."""
    info = infer_info(start)
    params, state = start, rule.init(start, info)
    trajectory = []
    for t in range(len(next(iter(grads.values())))):
        params, state = rule.update({n: g[t] for n, g in grads.items()}, state, params, rule.hp, Context(info))
        trajectory.append(params)
    return {name: torch.stack([params[name] for params in trajectory]) for name in start}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("inputs", "prefix"), [("learned_inputs", ""), ("learned_inputs_edge", "edge/")])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("functional", torch.float64), ("plain", torch.float64), ("foreach", torch.float64),
        ("functional", torch.float32), ("foreach", torch.float32), ("fused", torch.float32),
    ],
)  # fmt: skip
def test_trajectory_agrees_with_the_jax_original(
    name: str, inputs: str, prefix: str, form: Any, dtype: torch.dtype
) -> None:
    arrays, meta = load(name)
    given, _ = load(inputs)
    start, grads = under(given, "params0", dtype), under(given, "grads", dtype)
    rule = RULES[name].bind(theta_of(name, dtype))
    trajectory = (
        functional(rule, start, grads) if form == "functional" else torch_optim_trajectory(rule, start, grads, form)
    )
    wanted = under(arrays, f"{prefix}params64" if dtype == torch.float64 else f"{prefix}params", dtype)
    errors = meta["edge" if prefix else "main"]["float32_vs_float64"]
    for tensor, values in trajectory.items():
        if dtype == torch.float64:
            assert_trajectory_close(values, wanted[tensor], start[tensor], of_move=1e-10, of_size=1e-14)
        else:  # ten times the original's own float32 error
            error = (values - wanted[tensor]).abs().max()
            assert error <= 10 * errors[tensor]["max_abs_diff"], (tensor, error, errors[tensor]["max_abs_diff"])
