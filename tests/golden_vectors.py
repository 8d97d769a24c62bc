"""Reference vectors made by running other projects' code (see tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metaopt
from metaopt.execution import Execution
from metaopt.rule import Params, UpdateRule

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of one file."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return arrays, json.loads(str(arrays.pop("meta", "{}")))


def under(arrays: dict[str, np.ndarray], prefix: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The arrays below ``prefix/`` as tensors."""
    start = f"{prefix}/"
    return {k[len(start) :]: torch.from_numpy(v).to(dtype) for k, v in arrays.items() if k.startswith(start)}


def assert_trajectory_close(got: Tensor, want: Tensor, start: Tensor, *, of_move: float, of_size: float) -> None:
    """|got - want| <= of_move * largest move + of_size * largest parameter, over the whole trajectory."""
    move = (want - start).abs().max()
    bound = of_move * move + of_size * want.abs().max()
    error = (got - want).abs().max()
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e} (move {move:.3e})"


def torch_optim_trajectory(
    rule: UpdateRule,
    start: Params,
    grads: Params,
    execution: Execution,
    losses: Tensor | None = None,
    horizon: int | None = None,
) -> dict[str, Tensor]:
    """Parameters after every step [steps, ...] of ``metaopt.optimizer``, from gradients and losses [steps, ...]."""
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = metaopt.optimizer(rule, params.items(), execution=execution, horizon=horizon)
    trajectory = []
    for t in range(len(next(iter(grads.values())))):
        for name, p in params.items():
            p.grad = grads[name][t].clone()
        optimizer.step(loss=None if losses is None else losses[t])
        trajectory.append({name: p.detach().clone() for name, p in params.items()})
    return {name: torch.stack([params[name] for params in trajectory]) for name in start}
