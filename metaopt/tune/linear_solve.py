"""Linear equations of trees by matrix-vector products: iterations counted out beforehand, open to ``vmap``, never waiting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaopt import tree
from metaopt.random import normal
from metaopt.tree import Tree
from metaopt.tune.derivatives import add, dot, norm, relative, transformed, zeros

Product = Callable[[Tree], Tree]
"""A linear map of trees of one structure."""

_LOOKS_EVERY = 10
"""Iterations between looks at whether the tolerance has been reached; each look waits for the device."""


def conjugate_gradient(product: Product, right: Tree, iterations: int, tolerance: float = 0.0) -> tuple[Tree, Tensor]:
    """Solve ``A x = right`` for symmetric positive definite A, from x = 0 (Hestenes and Stiefel 1952).

    Args:
        product: ``x -> A x``.
        right: the right-hand side.
        iterations: at most; exact after as many as A has distinct eigenvalues.
        tolerance: stop at this residual, relative to ``right``; rounding is always a stop.

    Returns:
        x, and the norm of its residual relative to that of ``right`` (0 for a zero ``right``), 0-d.
    """
    x, residual, direction = zeros(right), right, right
    start = squared = dot(right, right)
    enough = start * max(tolerance, torch.finfo(start.dtype).eps) ** 2
    for i in range(iterations):
        if tolerance and i and i % _LOOKS_EVERY == 0 and not transformed() and bool(squared <= enough):
            break
        image = product(direction)
        curvature = dot(direction, image)
        goes_on = (squared > enough) & (curvature != 0)  # converged copies of a vmap stay where they are
        length = torch.where(goes_on, squared / torch.where(goes_on, curvature, 1), 0)
        x, residual = add(x, direction, length), add(residual, image, -length)
        before, squared = squared, dot(residual, residual)
        direction = add(residual, direction, torch.where(goes_on, squared / torch.where(goes_on, before, 1), 0))
    return x, relative(residual, right)


def neumann_series(product: Product, right: Tree, terms: int, step: float | Tensor) -> tuple[Tree, Tensor]:
    """``x = step * sum_{j < terms} (I - step A)^j right``, which tends to ``A^-1 right`` where ``step < 2 / L``.

    Returns:
        x, and the norm of its residual ``(I - step A)^terms right`` relative to that of ``right``, 0-d.
    """
    x, term = zeros(right), right
    for _ in range(terms):
        x = add(x, term)
        term = add(term, product(term), -step)
    return tree.map_tree(lambda leaf: step * leaf, x), relative(term, right)


def largest_eigenvalue(product: Product, like: Tree, iterations: int) -> Tensor:
    """The largest absolute eigenvalue of a symmetric map by power iteration, from below, 0-d."""
    key = torch.zeros((), dtype=torch.int64, device=next(iter(tree.leaves(like))).device)
    streams = iter(range(1 << 20))
    vector = tree.map_tree(lambda leaf: normal(key, leaf.shape, next(streams), leaf.dtype), like)
    size = norm(vector)
    for _ in range(iterations):
        scale = torch.where(size > 0, size, 1)
        vector = product(tree.map_tree(lambda leaf, scale=scale: leaf / scale, vector))
        size = norm(vector)
    return size
