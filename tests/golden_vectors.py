"""Reference vectors made by running other projects' code (see tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
