"""Functions of matrices that kernels may compute: rules call the torch formula, and whoever steps them replaces it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Formula = Callable[[Tensor, int, Tensor | float], Tensor]
Replacement = Callable[[Tensor, int, Tensor | float], Tensor | None]

_replacements: dict[str, Replacement] = {}


def replaceable(formula: Formula) -> Formula:
    """Mark ``formula(matrices [..., m, n], steps, eps)``: it runs unless `replacing` has a kernel under its name.

    Exported files and recorded steps have the formula alone.
    """

    @functools.wraps(formula)
    def run(matrices: Tensor, steps: int, eps: Tensor | float) -> Tensor:
        kernel = _replacements.get(formula.__name__)
        if kernel is None or torch.is_grad_enabled():
            return formula(matrices, steps, eps)
        made: Tensor = _OutsideVmap.apply(matrices, eps, steps, kernel, formula)
        return made

    return run


@contextmanager
def replacing(kernels: Mapping[str, Replacement]) -> Iterator[None]:
    """Meanwhile these take the place of the `replaceable` functions of their names, where nothing is recorded."""
    before = dict(_replacements)
    _replacements.update(kernels)
    try:
        yield
    finally:
        _replacements.clear()
        _replacements.update(before)


class _OutsideVmap(torch.autograd.Function):
    """A kernel is handed all copies at once, as they lie in memory."""

    @staticmethod
    def forward(matrices: Tensor, eps: Tensor | float, steps: int, kernel: Replacement, formula: Formula) -> Tensor:
        made = kernel(matrices, steps, eps)
        return formula(matrices, steps, eps) if made is None else made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrices: Tensor, eps: Tensor | float, *rest: Any) -> tuple[Tensor, int]:
        of_matrices, of_eps = in_dims[:2]
        if of_matrices is None:
            matrices = matrices.expand(info.batch_size, *matrices.shape)
        else:
            matrices = matrices.movedim(of_matrices, 0)
        if isinstance(eps, Tensor) and of_eps is not None:
            eps = eps.movedim(of_eps, 0)
            eps = eps.reshape(len(eps), *(1,) * (matrices.dim() - eps.dim()), *eps.shape[1:])
        made: Tensor = _OutsideVmap.apply(matrices, eps, *rest)
        return made, 0
