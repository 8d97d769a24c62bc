"""The learned optimizer computes what the JAX original computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_vectors import assert_trajectory_close, load, under

from metaopt.rule import Context, infer_info
from metaopt_learned.adafac_mlp import AdafacMLP


def _theta(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name.removeprefix("nn/~/"): value for name, value in under(arrays, "theta", dtype).items()}


@pytest.mark.parametrize("hidden", [4, 32])
@pytest.mark.parametrize(("inputs", "prefix"), [("learned_inputs", ""), ("learned_inputs_edge", "edge/")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trajectory_agrees_with_the_jax_original(hidden: int, inputs: str, prefix: str, dtype: torch.dtype) -> None:
    arrays, meta = load(f"adafac_mlp_lopt_h{hidden}")
    given, _ = load(inputs)
    params, grads = under(given, "params0", dtype), under(given, "grads", dtype)
    rule = AdafacMLP(hidden=hidden, layout="jax").bind(_theta(arrays, dtype))
    info = infer_info(params)
    state, start = rule.init(params, info), params
    trajectory: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for t in range(len(next(iter(grads.values())))):
        params, state = rule.update({n: g[t] for n, g in grads.items()}, state, params, rule.hp, Context(info))
        for name, value in params.items():
            trajectory[name].append(value)
    wanted = under(arrays, f"{prefix}params64" if dtype == torch.float64 else f"{prefix}params", dtype)
    errors = meta["edge" if prefix else "main"]["float32_vs_float64"]
    for name, values in trajectory.items():
        if dtype == torch.float64:
            assert_trajectory_close(torch.stack(values), wanted[name], start[name], of_move=1e-10, of_size=1e-14)
        else:  # ten times the original's own float32 error
            assert (torch.stack(values) - wanted[name]).abs().max() <= 10 * errors[name]["max_abs_diff"]
