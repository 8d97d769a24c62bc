"""Solutions of equations, differentiated by the implicit function theorem instead of through the solver.

After Blondel et al. 2022, "Efficient and modular implicit differentiation" (arXiv:2105.15183), section 2.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.random import normal
from metaopt.tree import Tree
from metaopt.tune.derivatives import (
    Pull,
    add,
    bare,
    dot,
    filled,
    floating,
    like,
    norm,
    refuse_lost_tangents,
    vanish,
    vjp,
)
from metaopt.tune.linear_solve import conjugate_gradient

Optimality = Callable[..., Tree]
"""``optimality(x, *arguments)``: a tree like x, zero at the solution."""


def implicit(
    optimality: Optimality,
    solver: Callable[..., Tree],
    *,
    symmetric: bool = True,
    iterations: int = 100,
    tolerance: float = 0.0,
) -> Callable[..., Tree]:
    """``solver`` with the derivatives of the solution that ``optimality`` describes, whatever it does inside.

    With F = optimality, x its zero and J = dF/dx: ``dx/da = -J^-1 dF/da``. Reverse and forward mode, derivatives of
    derivatives, and ``vmap`` (if solver and optimality allow it) all work; the error is that of x and of the linear system.

    >>> def ridge(x, y, l):
    ...     return torch.linalg.solve(x.T @ x + torch.diag(l), x.T @ y)
    >>> solve = implicit(lambda w, x, y, l: x.T @ (x @ w - y) + l * w, ridge)
    >>> solve(torch.eye(2), torch.ones(2), torch.ones(2, requires_grad=True)).sum().backward()

    Args:
        optimality: the gradient of what is minimised, ``x - step(x, ...)`` of a fixed point, or any equation.
        solver: ``solver(*arguments) -> x``, each a tensor or a nested dict of tensors.
        symmetric: whether J is symmetric and positive definite, as of a minimum, for conjugate gradients on J; else they run on
            the normal equations, which square its condition number.
        iterations: of the linear solver, at most.
        tolerance: its relative residual at which to stop (not under ``vmap``).

    Raises:
        ValueError: ``iterations`` < 1; when derivatives are taken, a J that is not symmetric where ``symmetric`` says so.
        MissingGradient: when derivatives are taken, and ``optimality`` depends on x or an argument without having one.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")

    def solve(*arguments: Tree) -> Tree:
        problem = _Problem(optimality, solver, arguments, symmetric, iterations, tolerance)
        leaves = _Solution.apply(problem, *(leaf for argument in arguments for leaf in tree.leaves(argument)))
        return like(problem.structure, leaves)

    return solve


@dataclass
class _Problem:
    optimality: Optimality
    solver: Callable[..., Tree]
    arguments: tuple[Tree, ...]
    symmetric: bool
    iterations: int
    tolerance: float
    structure: Tree = field(default=None)

    def arguments_of(self, leaves: Any) -> tuple[Tree, ...]:
        rest = iter(leaves)
        return tuple(tree.map_tree(lambda _: next(rest), argument) for argument in self.arguments)

    def linear(self, x: Tree, arguments: tuple[Tree, ...], right: Tree, transposed: bool) -> Tree:
        """``J^-1 right``, or with J transposed; itself an implicit solution, so that it has derivatives."""
        names = [str(i) for i in range(len(arguments))]

        def product(u: Tree, x: Tree, given: dict[str, Tree]) -> Tree:
            def residual(x: Tree) -> Tree:
                return self.optimality(x, *(given[name] for name in names))

            if transposed or self.symmetric:
                return _pullback(residual, x, names=["x"])(u)[0]
            return torch.func.jvp(residual, (x,), (u,))[1]

        def equation(u: Tree, x: Tree, given: dict[str, Tree], right: Tree) -> Tree:
            return add(product(u, x, given), right, -1.0)

        def solver(x: Tree, given: dict[str, Tree], right: Tree) -> Tree:
            def matrix(u: Tree) -> Tree:
                return product(u, x, given)

            if self.symmetric:
                _require_symmetric(matrix, right)
                return conjugate_gradient(matrix, right, self.iterations, self.tolerance)[0]
            adjoint = _pullback(matrix, right, names=["x"])
            return conjugate_gradient(
                lambda u: adjoint(matrix(u))[0], adjoint(right)[0], self.iterations, self.tolerance
            )[0]

        solve = implicit(
            equation, solver, symmetric=self.symmetric, iterations=self.iterations, tolerance=self.tolerance
        )
        return solve(x, dict(zip(names, arguments, strict=True)), right)


class _Solution(torch.autograd.Function):
    """``(problem, *leaves of arguments) -> leaves of x``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, *leaves: Tensor) -> tuple[Tensor, ...]:
        problem.structure = problem.solver(*problem.arguments_of(leaves))
        return tuple(tree.leaves(tree.detach(problem.structure)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, leaves = inputs[0], inputs[1:]
        ctx.save_for_backward(*leaves, *output)
        ctx.save_for_forward(*leaves, *output)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor | None, ...]:
        problem, x, arguments = _saved(ctx)
        u = problem.linear(x, arguments, like(problem.structure, bars), transposed=True)
        parts = [floating(argument) for argument in arguments]
        pull = _pullback(
            lambda *given: problem.optimality(x, *map(filled, arguments, given)), *parts, names=_names(parts)
        )
        found = map(_with_gaps, arguments, pull(tree.map_tree(torch.neg, u)))
        return None, *(grad for grads in found for grad in grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        problem, x, arguments = _saved(ctx)
        flat = [leaf for argument in arguments for leaf in tree.leaves(argument)]
        moves = [torch.zeros_like(leaf) if t is None else t for leaf, t in zip(flat, tangents, strict=True)]
        parts = tuple(floating(argument) for argument in arguments)
        slopes = tuple(floating(argument) for argument in problem.arguments_of(moves))

        def residual(*given: Tree) -> Tree:
            return problem.optimality(x, *map(filled, arguments, given))

        found: Any = torch.func.jvp(residual, parts, slopes)
        right = found[1]
        if all(vanish(list(tree.leaves(right)))):
            still = vanish([leaf for part in slopes for leaf in tree.leaves(part)])
            refuse_lost_tangents(residual, parts, _names(parts), [not zero for zero in still])
        return tuple(tree.leaves(problem.linear(x, arguments, tree.map_tree(torch.neg, right), transposed=False)))


def _require_symmetric(matrix: Callable[[Tree], Tree], example: Tree) -> None:
    """Refuse a map with <u, A v> other than <v, A u>, for which conjugate gradients would give anything."""
    streams = itertools.count()
    key = torch.zeros((), dtype=torch.int64, device=next(tree.leaves(example)).device)
    u, v = (tree.map_tree(lambda leaf: normal(key, leaf.shape, next(streams), leaf.dtype), example) for _ in range(2))
    image = matrix(v)
    rounding = torch.finfo(next(tree.leaves(image)).dtype).eps ** 0.5
    skew = (dot(u, image) - dot(v, matrix(u))).abs() > rounding * norm(u) * norm(image)
    if bool(bare(skew).any()):
        raise ValueError(
            "the derivative of the optimality function is not symmetric, as that of a gradient is; give implicit "
            "symmetric=False"
        )


def _pullback(function: Callable[..., Tree], *inputs: Tree, names: Sequence[str]) -> Pull:
    return vjp(function, *inputs, names=names, differentiable=True)[1]


def _names(arguments: Sequence[Tree]) -> list[str]:
    return [f"argument {i}" for i in range(len(arguments))]


def _saved(ctx: Any) -> tuple[_Problem, Tree, tuple[Tree, ...]]:
    problem = ctx.problem
    count = sum(1 for argument in problem.arguments for _ in tree.leaves(argument))
    leaves = ctx.saved_tensors
    return problem, like(problem.structure, leaves[count:]), problem.arguments_of(leaves[:count])


def _with_gaps(argument: Tree, grads: Tree) -> list[Tensor | None]:
    """A gradient for every leaf; None for those of integers."""
    if isinstance(argument, dict):
        pairs = [(value, grads.get(name) if grads else None) for name, value in argument.items()]
        return [grad for value, part in pairs for grad in _with_gaps(value, part)]
    return [grads]
