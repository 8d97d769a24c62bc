"""Accumulators and blocks of features that several learned optimizers share; what they mean is in `metaopt.perparameter`."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.perparameter import Decays

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAYS = (0.999,)
FACTORED_DECAYS = (0.9, 0.99, 0.999)

OF_LINES = ("row", "col", "rsqrt_row", "rsqrt_col", "factored_m")
ADAFAC_BLOCKS = ("g", "p", "m", "v", "m_r", "r", "factored_g", *OF_LINES)
"""28 features with the decays above."""
VELO_VECTOR_BLOCKS = ("g", "clipped_g", "p", "m", "v", "m_r", "r", "factored_g", "g_r")
VELO_BLOCKS = (*VELO_VECTOR_BLOCKS, *OF_LINES)
"""30 features."""


def constant(decays: tuple[float, ...], like: Tensor) -> Tensor:
    """Decays that are not learned."""
    return torch.tensor(decays, dtype=like.dtype, device=like.device)


def constant_decays(like: Tensor, rms: tuple[float, ...] = RMS_DECAYS) -> Decays:
    """Those above in ``like``'s dtype, with these of second moments."""
    values = {"momentum": MOMENTUM_DECAYS, "rms": rms, "factored": FACTORED_DECAYS}
    return {kind: constant(decays, like) for kind, decays in values.items()}
