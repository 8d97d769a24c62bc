"""Implicit differentiation of users' own solvers, against solvers that autograd differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import draws
from torch import Tensor

from metaopt.tree import Tree
from metaopt.tune import MissingGradient, implicit

X, Y = draws(20, 5, seed=1), draws(20, seed=2)


def ridge(logs: Tensor) -> Tree:
    w = torch.linalg.solve(X.mT @ X + torch.diag(logs.exp()), X.mT @ Y)
    return {"a": w[:2], "b": w[2:]}


def ridge_gradient(w: Tree, logs: Tensor) -> Tree:
    flat = torch.cat([w["a"], w["b"]])
    grad = X.mT @ (X @ flat - Y) + logs.exp() * flat
    return {"a": grad[:2], "b": grad[2:]}


def cubes(solver: Any) -> Any:
    def objective(logs: Tensor) -> Tensor:
        w = solver(logs)
        return (w["a"] ** 3).sum() + (w["b"] ** 2).sum()

    return objective


DIRECT, IMPLICIT = cubes(ridge), cubes(implicit(ridge_gradient, ridge))
LOGS = torch.linspace(-1, 1, 5, dtype=torch.float64)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.hessian, torch.func.jacrev])
def test_derivatives_are_those_of_the_closed_form(transform: Any) -> None:
    torch.testing.assert_close(transform(IMPLICIT)(LOGS), transform(DIRECT)(LOGS), rtol=1e-9, atol=1e-13)


def test_plain_autograd_differentiates_twice() -> None:
    def second(objective: Any) -> Tensor:
        at = LOGS.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(at), at, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), at)[0]

    torch.testing.assert_close(second(IMPLICIT), second(DIRECT), rtol=1e-9, atol=1e-14)


def _backward(solve: Any) -> Tensor:
    at = torch.ones(2, requires_grad=True)
    return torch.autograd.grad(solve(at).sum(), at)[0]


@pytest.mark.parametrize(
    "derive",
    [
        _backward,
        lambda solve: torch.func.jvp(solve, (torch.ones(2),), (torch.ones(2),)),
        lambda solve: torch.vmap(torch.func.grad(lambda a: solve(a).sum()))(torch.ones(3, 2)),
        lambda solve: torch.vmap(lambda a: torch.func.jvp(solve, (a,), (a,))[1])(torch.ones(3, 2)),
    ],
    ids=["backward", "jvp", "vmapped grad", "vmapped jvp"],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_lost_derivative_is_refused(derive: Any, symmetric: bool) -> None:
    solve = implicit(lambda x, a: x - a.detach() ** 2, lambda a: a**2, symmetric=symmetric)
    with pytest.raises(MissingGradient, match="the result depends on argument 0 but has no derivative"):
        derive(solve)


def test_an_argument_without_effect_has_derivative_zero() -> None:
    solve = implicit(lambda x, a, _: x - a**2, lambda a, _: a**2)
    at = torch.ones(2), torch.ones(2)
    assert torch.equal(torch.func.grad(lambda b: solve(at[0], b).sum())(at[1]), torch.zeros(2))
    assert torch.equal(torch.func.jvp(lambda b: solve(at[0], b), (at[1],), (at[1],))[1], torch.zeros(2))


def test_vmap_over_problems() -> None:
    many = LOGS + draws(3, 5, seed=3)
    gradients = [torch.vmap(torch.func.grad(objective))(many) for objective in (IMPLICIT, DIRECT)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


def test_equations_need_not_be_symmetric() -> None:
    """A fixed point x = tanh(Wx + b): its solver iterates in place and is not differentiable."""
    matrix = 0.4 * draws(4, 4, seed=4)

    def solver(w: Tensor, b: Tensor) -> Tensor:
        x = torch.zeros(4, dtype=torch.float64)
        for _ in range(300):
            x.copy_(torch.tanh(w @ x + b))
        return x

    def iterated(w: Tensor, b: Tensor) -> Tensor:
        x = torch.zeros(4, dtype=torch.float64)
        for _ in range(300):
            x = torch.tanh(w @ x + b)
        return x

    solve = implicit(lambda x, w, b: x - torch.tanh(w @ x + b), solver, symmetric=False)
    at = (matrix, draws(4, seed=5))
    by_theorem, through = (torch.func.jacrev(f, argnums=(0, 1))(*at) for f in (solve, iterated))
    torch.testing.assert_close(by_theorem, through, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(solve, argnums=1)(*at), through[1], rtol=1e-8, atol=1e-12)


def test_integers_among_the_arguments_are_carried_along() -> None:
    solve = implicit(lambda w, h: 2 * w - h["n"] * h["a"], lambda h: h["n"] * h["a"] / 2)
    a = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(solve({"n": torch.tensor(3), "a": a}).sum(), a)
    torch.testing.assert_close(grad, torch.full((2,), 1.5))
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        implicit(lambda w: w, lambda: torch.zeros(1), iterations=0)


def test_an_equation_that_is_not_symmetric_must_say_so() -> None:
    matrix = torch.eye(4, dtype=torch.float64) + 0.4 * draws(4, 4, seed=4)
    solve = implicit(lambda x, b: matrix @ x - b, lambda b: torch.linalg.solve(matrix, b))
    with pytest.raises(ValueError, match="is not symmetric, as that of a gradient is; give implicit symmetric=False"):
        solve(draws(4, seed=5).requires_grad_()).sum().backward()
    with pytest.raises(ValueError, match="is not symmetric"):
        torch.vmap(torch.func.grad(lambda b: solve(b).sum()))(draws(3, 4, seed=5))
