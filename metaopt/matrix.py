"""Functions of matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from metaopt.replacing import replaceable

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b and c of `newton_schulz`."""

STEPS_AT_ONCE = 3
"""How many steps `newton_schulz` takes on A = X X^T before their product meets a long X."""


@replaceable
def newton_schulz(matrices: Tensor, steps: int, eps: Tensor | float) -> Tensor:
    """Approximately orthogonalise ``matrices`` [..., m, n]: singular values are moved to about 0.7 .. 1.2.

    X <- a X + (b A + c A^2) X with A = X X^T, on X scaled to Frobenius norm 1, the short side first. Jordan et al., 2024
    (https://kellerjordan.github.io/posts/muon/).

    With P = a I + b A + c A^2 a step makes P X of X, and P A P of A. Where X is long, on a CPU, three steps therefore work on
    the small A, and the product of their P meets X once. Not more than three: A has the rounding error of its largest entries,
    and a step multiplies what belongs to small singular values, error included, by a^2. Five steps in float32 have a relative
    error of at most 1e-4, and 2e-4 for rank one; were every step one on X, these bounds would be half as large.

    Args:
        matrices: float32 or float64.
        steps: iterations.
        eps: added to the Frobenius norm; broadcasts against [..., 1, 1].
    """
    a, _, _ = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    if x.is_cpu and x.shape[-1] >= 2 * x.shape[-2]:  # a GPU's TF32 products would lose the small values of A
        for done in range(0, steps, STEPS_AT_ONCE):
            x = _product_of_steps(_symmetric_product(x, x.mT), min(STEPS_AT_ONCE, steps - done)) @ x
    else:
        for _ in range(steps):
            x = (_higher_terms(_symmetric_product(x, x.mT)) @ x).add(x, alpha=a)
    return x.mT if tall else x


def as_matrix(tensor: Tensor) -> Tensor:
    """``tensor`` as [rows, columns]: its first dimension, and all others together. A vector is one row."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, tensor.numel())


def overridable(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let what stands for a tensor have its own say, as torch's functions do: tracing hands them symbols."""

    @functools.wraps(function)
    def run(tensor: Tensor) -> Tensor:
        if has_torch_function_unary(tensor):
            made: Tensor = handle_torch_function(run, (tensor,), tensor)
            return made
        return function(tensor)

    return run


@overridable
def orthogonalise(tensor: Tensor) -> Tensor:
    """``tensor`` with all singular values of `as_matrix` moved to about 1, by five steps of `newton_schulz`, as in Muon.

    A vector becomes a vector of about length 1.
    """
    return newton_schulz(as_matrix(tensor), 5, 1e-8).reshape(tensor.shape)


@overridable
def row_mean(tensor: Tensor) -> Tensor:
    """In place of each element the mean of its row of `as_matrix`; of a vector, its mean."""
    matrix = as_matrix(tensor)
    return matrix.mean(1, keepdim=True).expand_as(matrix).reshape(tensor.shape)


@overridable
def column_mean(tensor: Tensor) -> Tensor:
    """In place of each element the mean of its column of `as_matrix`; a vector, which is one row, stays as it is."""
    matrix = as_matrix(tensor)
    return matrix.mean(0, keepdim=True).expand_as(matrix).reshape(tensor.shape)


@overridable
def row_count(tensor: Tensor) -> Tensor:
    """How many rows `as_matrix` has, 0-d in the dtype of ``tensor``."""
    return torch.full((), as_matrix(tensor).shape[0], dtype=tensor.dtype, device=tensor.device)


@overridable
def column_count(tensor: Tensor) -> Tensor:
    """How many columns `as_matrix` has, 0-d in the dtype of ``tensor``."""
    return torch.full((), as_matrix(tensor).shape[1], dtype=tensor.dtype, device=tensor.device)


def _product_of_steps(gram: Tensor, steps: int) -> Tensor:
    """The product of P over ``steps`` steps from A [..., m, m]; as polynomials of A they all commute."""
    a, _, _ = QUINTIC
    a_identity = a * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = product = a_identity + _higher_terms(gram)
    for _ in range(steps - 1):
        gram = _symmetric_product(_symmetric_product(factor, gram), factor)
        factor = a_identity + _higher_terms(gram)
        product = _symmetric_product(factor, product)
    return product


def _higher_terms(gram: Tensor) -> Tensor:
    """b A + c A^2 of A [..., m, m]."""
    _, b, c = QUINTIC
    return (b * gram).add(_symmetric_product(gram, gram), alpha=c)


def _symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left`` [..., m, k] times ``right`` [..., k, m] where that is symmetric: about half is computed, the rest mirrored."""
    rows = left.shape[-2]
    if rows < 256 or not left.is_cpu:  # smaller products, and those of GPUs, take longer in panels than whole
        return left @ right
    product = left.new_empty(*left.shape[:-1], rows)
    height = max(64, rows // 8)
    for top in range(0, rows, height):
        panel = left[..., top : top + height, :] @ right[..., top:]
        product[..., top : top + height, top:] = panel
        product[..., top + height :, top : top + height] = panel[..., height:].mT
    return product
