"""Functions of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.replacing import replaceable

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b and c of `newton_schulz`."""


@replaceable
def newton_schulz(matrices: Tensor, steps: int, eps: Tensor | float) -> Tensor:
    """Approximately orthogonalise ``matrices`` [..., m, n]: singular values are moved to about 0.7 .. 1.2.

    X <- a X + (b A + c A^2) X with A = X X^T, on X scaled to Frobenius norm 1, the short side first. Jordan et al., 2024
    (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
