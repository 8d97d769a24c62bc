"""Every registered method against formulas: none may be silently wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_forms import PROBLEMS, STEPS, Problem, draws
from torch import Tensor

from metaopt.tune import METHODS, Inner, hypergradient
from metaopt_classic.sgd import SGD

EXACT: dict[str, dict[str, Any]] = {
    "unroll": {},
    "checkpoint": {},
    "replay": {"states": 8, "branching": 3},
    "forward": {"chunk": 20},
    "truncated": {"window": 40},
    "cg": {"iterations": 10},
    "neumann": {"terms": 100},
    "fixed_point": {"iterations": 40},
}
"""Methods that reach the formula of the optimum, and with what options; the runs have converged."""

OF_THE_RUN = ("unroll", "checkpoint", "replay", "forward")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.reshape(-1) - expected).norm() / expected.norm())


def found(problem: Problem, method: str, **options: Any) -> Tensor:
    (grad,) = hypergradient(problem.inner(), problem.outer, problem.hypers, method, **options).grads.values()
    return grad


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_reach_the_formula(method: str, name: str) -> None:
    problem = PROBLEMS[name]()
    assert relative(found(problem, method, **EXACT[method]), problem.exact) < 1e-8


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["identity", "darts", "sama"])
def test_one_step_methods_are_their_own_formula(method: str, name: str) -> None:
    problem = PROBLEMS[name]()
    scale = problem.rate if method == "sama" else 0.2
    expected = problem.direct - scale * problem.mixed @ problem.right
    # finite differences of radius 1e-4 err by their square, and by rounding over 1e-4
    options = {"identity": {"scale": scale}, "darts": {"scale": scale, "radius": 1e-4}, "sama": {"radius": 1e-4}}
    assert relative(found(problem, method, **options[method]), expected) < 1e-8


@pytest.mark.parametrize("name", PROBLEMS)
def test_nystrom_of_full_rank_errs_by_rho(name: str) -> None:
    problem = PROBLEMS[name]()
    smallest = float(torch.linalg.eigvalsh(problem.hessian)[0])
    implicit_part = (problem.exact - problem.direct).norm() / problem.exact.norm()
    for rho in (1e-2, 1e-4):
        error = relative(found(problem, "nystrom", rank=len(problem.optimum), rho=rho), problem.exact)
        spread = problem.mixed.norm() * problem.right.norm() / (problem.exact - problem.direct).norm()
        assert error < float(spread * implicit_part) * rho / smallest**2


@pytest.mark.parametrize("name", PROBLEMS)
def test_penalty_errs_by_one_over_its_strength(name: str) -> None:
    problem = PROBLEMS[name]()
    weak, strong = (relative(found(problem, "penalty", strength=s, steps=60), problem.exact) for s in (200.0, 400.0))
    assert weak < 0.2 and 1.9 < weak / strong < 2.1


def test_evolution_strategies_have_the_error_of_their_number_of_pairs() -> None:
    problem = PROBLEMS["quadratic"]()
    pairs = 400
    inner = problem.inner(30)
    exact = hypergradient(inner, problem.outer, problem.hypers, "unroll").grads["l"]
    es = hypergradient(inner, problem.outer, problem.hypers, "es", pairs=pairs, sigma=0.01, copies=2 * pairs).grads["l"]
    # the objective is quadratic: no bias; the squared error has mean (H + 1) / N
    assert relative(es, exact) < 2.5 * math.sqrt((len(exact) + 1) / pairs)


def test_the_audit_leaves_no_method_out() -> None:
    assert set(METHODS) == {*EXACT, "identity", "darts", "sama", "nystrom", "penalty", "es"}


@pytest.mark.parametrize("method", [*OF_THE_RUN, "truncated"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_learning_rate_of_gradient_descent(method: str, steps: int) -> None:
    """d w_T / d eta = T (I - eta A)^(T-1) A w* from w_0 = 0."""
    root, b, c = draws(5, 5, seed=1), draws(5, seed=2), draws(5, seed=3)
    matrix = torch.eye(5, dtype=torch.float64) + root @ root.mT / 10
    optimum, eta = torch.linalg.solve(matrix, b), 0.3
    contraction = torch.eye(5, dtype=torch.float64) - eta * matrix
    at_end = optimum - torch.linalg.matrix_power(contraction, steps) @ optimum
    slope = steps * torch.linalg.matrix_power(contraction, steps - 1) @ matrix @ optimum
    inner = Inner.of_rule(
        lambda p, h, _: p["w"] @ matrix @ p["w"] / 2 - p["w"] @ b,
        SGD(),
        {"w": torch.zeros(5, dtype=torch.float64)},
        steps,
        hp=["lr"],
    )
    result = hypergradient(
        inner, lambda p, h: ((p["w"] - c) ** 2).sum() / 2, {"lr": torch.tensor(eta, dtype=torch.float64)}, method
    )
    torch.testing.assert_close(result.params["w"], at_end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.grads["lr"], slope @ (at_end - c), rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", OF_THE_RUN)
def test_a_learning_rate_per_step(method: str) -> None:
    """w_T - w* = prod_t (1 - eta_t a) (w_0 - w*): each rate's derivative leaves its own factor out."""
    curvature, steps = 1.7, 6
    rates = torch.linspace(0.1, 0.4, steps, dtype=torch.float64)
    factors = 1 - rates * curvature
    inner = Inner.of_rule(
        lambda p, h, _: curvature * p["w"] ** 2 / 2,
        SGD(),
        {"w": torch.tensor(2.0, dtype=torch.float64)},
        steps,
        hp=["lr"],
    )
    result = hypergradient(inner, lambda p, h: p["w"], {"lr": rates}, method)
    torch.testing.assert_close(result.grads["lr"], -2.0 * curvature * factors.prod() / factors, rtol=1e-12, atol=0)


def test_neumann_terms_are_truncated_steps_at_the_optimum() -> None:
    problem = PROBLEMS["ridge"]()
    for count in (1, 2, 5, 16):
        series = found(problem, "neumann", terms=count, step=problem.rate)
        torch.testing.assert_close(series, found(problem, "truncated", window=count), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("method", "option"), [("truncated", "window"), ("neumann", "terms"), ("fixed_point", "iterations")]
)
def test_truncation_errors_fall_at_the_predicted_rate(method: str, option: str) -> None:
    """The slowest mode of (I - eta H)^K: a straight line in log error against K."""
    problem = PROBLEMS["quadratic"]()
    eigenvalues = torch.linalg.eigvalsh(problem.hessian)
    rate = float(0.5 / eigenvalues[-1])  # well below 2 / (L + a), so that one mode is the slowest by far
    inner = Inner.of_rule(problem.loss, SGD(lr=rate), problem.params, 4 * STEPS)
    predicted = math.log(1 - rate * float(eigenvalues[0]))
    errors = []
    for count in (40, 60):
        options = {option: count} | ({"step": rate} if method == "neumann" else {})
        result = hypergradient(inner, problem.outer, problem.hypers, method, **options)
        errors.append(relative(result.grads["l"], problem.exact))
    assert math.log(errors[1] / errors[0]) / 20 == pytest.approx(predicted, rel=0.02)
