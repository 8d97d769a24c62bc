"""Newton-Schulz iterations of wide matrices on a CPU by NumPy, whose BLAS makes half of a symmetric product."""

from __future__ import annotations

import functools

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from metaopt.matrix import QUINTIC, STEPS_AT_ONCE

NARROWEST = 256
"""The short side from which on NumPy wins over torch."""


def newton_schulz(matrices: Tensor, steps: int, eps: Tensor | float) -> Tensor | None:
    """`metaopt.matrix.newton_schulz`, with its bounds of the error; nothing is recorded for autograd.

    NumPy sees that X X^T is symmetric and calls ``syrk``, which torch does not, and is quicker with panels. It takes as many
    threads as torch.

    Args:
        matrices: [..., m, n] float32 or float64, of any strides.
        steps: iterations.
        eps: added to the Frobenius norm; broadcasts against [..., 1, 1].

    Returns:
        [..., m, n] in the dtype of ``matrices``; None for other dtypes, and where the short side is below `NARROWEST`.
    """
    short, long = sorted(matrices.shape[-2:])
    if short < NARROWEST or matrices.dtype not in (torch.float32, torch.float64) or not matrices.numel():
        return None
    matrices = matrices.detach()
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + eps)).contiguous().numpy()
    tall = matrices.shape[-2] > matrices.shape[-1]
    at_once = STEPS_AT_ONCE if long >= 2 * short else 1
    threads = _thread_pools().limit(limits=torch.get_num_threads(), user_api="blas")
    with threads, np.errstate(all="ignore"):  # what is not finite is no concern of a warning
        for done in range(0, steps, at_once):
            side = x.swapaxes(-2, -1) if tall else x
            gram = _symmetric_product(side, side.swapaxes(-2, -1)) if at_once == 1 else side @ side.swapaxes(-2, -1)
            factor = product = _factor(gram)
            for _ in range(min(at_once, steps - done) - 1):
                gram = _symmetric_product(_symmetric_product(factor, gram), factor)
                factor = _factor(gram)
                product = _symmetric_product(factor, product)
            x = x @ product if tall else product @ x
    return torch.from_numpy(x)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def _factor(gram: np.ndarray) -> np.ndarray:
    """a I + b A + c A^2 of A [..., m, m]."""
    a, b, c = QUINTIC
    factor = _symmetric_product(gram, gram)
    factor *= c
    factor += b * gram
    diagonal = np.einsum("...ii->...i", factor)  # a view
    diagonal += a
    return factor


def _symmetric_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[..., m, k] times [..., k, m] where that is symmetric: about half is computed, the rest mirrored."""
    rows = left.shape[-2]
    product = np.empty((*left.shape[:-1], rows), left.dtype)
    height = max(64, rows // 8)
    for top in range(0, rows, height):
        below = top + height
        np.matmul(left[..., top:below, :], right[..., top:], out=product[..., top:below, top:])
        product[..., below:, top:below] = product[..., top:below, below:].swapaxes(-2, -1)
    return product
