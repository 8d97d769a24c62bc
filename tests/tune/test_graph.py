"""Problems above problems, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaopt.resolve import resolve_rule
from metaopt.tune import hypergradient
from metaopt.tune.graph import Graph, Level, Values

F64 = torch.float64


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# near the identity, so that 20 steps of size 1 solve a level to rounding
A1 = torch.eye(3, dtype=F64) + 0.05 * (draws(3, 3, seed=1) + draws(3, 3, seed=1).T)
A2 = torch.eye(4, dtype=F64) + 0.05 * (draws(4, 4, seed=2) + draws(4, 4, seed=2).T)
B, C, D, E = draws(3, 4, seed=3), draws(3, 2, seed=4), draws(4, 2, seed=5), 0.05 * draws(4, 3, seed=6)
GOAL, TOP = draws(3, seed=7), draws(2, seed=8)


def bottom_loss(w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return w1 @ A1 @ w1 / 2 - w1 @ (B @ w2 + C @ w3)


def middle_loss(w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return w2 @ A2 @ w2 / 2 - w2 @ D @ w3 + w2 @ E @ w1 + 0.01 * w1 @ w1


def top_loss(w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return ((w1 - GOAL) ** 2).sum() + 0.2 * (w2**2).sum() + w3 @ w3


def exact(w3: Tensor) -> Tensor:
    """Gradient of the top: each answer is the solution of a linear system."""

    def bottom(w2: Tensor, w3: Tensor) -> Tensor:
        return torch.linalg.solve(A1, B @ w2 + C @ w3)

    def middle(w3: Tensor) -> Tensor:
        # middle_loss at w1 = M w2 + N w3, as a quadratic in w2
        m, n = torch.linalg.solve(A1, B), torch.linalg.solve(A1, C)
        hessian = A2 + E @ m + m.T @ E.T + 0.02 * m.T @ m
        return torch.linalg.solve(hessian, D @ w3 - E @ n @ w3 - 0.02 * m.T @ n @ w3)

    def total(w3: Tensor) -> Tensor:
        w2 = middle(w3)
        return top_loss(bottom(w2, w3), w2, w3)

    return torch.func.grad(total)(w3)


def level(name: str, loss: object, size: int, steps: int, uses: tuple[str, ...]) -> Level:
    def of_values(values: Values) -> Tensor:
        return loss(*(values[one]["w"] for one in ("bottom", "middle", "top")))  # type: ignore[operator]

    start = {"w": torch.zeros(size, dtype=F64)}
    return Level(name, of_values, start, resolve_rule("sgd", lr=1.0) if steps else None, steps, uses)


def three_levels(optima: bool) -> Graph:
    return Graph(
        [
            level("bottom", bottom_loss, 3, 20, ("middle", "top")),
            level("middle", middle_loss, 4, 25, ("bottom", "top")),
            level("top", top_loss, 2, 0, ("bottom", "middle")),
        ],
        optima=optima,
    )


@pytest.mark.parametrize(("optima", "method"), [(False, "unroll"), (True, "cg")])
def test_three_quadratic_levels_have_the_gradient_of_the_closed_form(optima: bool, method: str) -> None:
    graph = three_levels(optima)
    found = hypergradient(graph.inner(), graph.outer, {"w": TOP}, method)
    torch.testing.assert_close(found.grads["w"], exact(TOP), rtol=1e-8, atol=0)


def test_levels_that_do_not_use_each_other_are_solved_once() -> None:
    calls = {"left": 0, "right": 0}

    def side(name: str) -> Level:
        def loss(values: Values) -> Tensor:
            calls[name] += 1
            return ((values[name]["w"] - values["top"]["w"]) ** 2).sum() / 2

        return Level(name, loss, {"w": torch.zeros(2, dtype=F64)}, resolve_rule("sgd", lr=0.5), 10, ("top",))

    def top(values: Values) -> Tensor:
        return (values["left"]["w"] * values["right"]["w"]).sum()

    graph = Graph([side("left"), side("right"), Level("top", top, {"w": TOP}, uses=("left", "right"))])
    found = hypergradient(graph.inner(), graph.outer, {"w": TOP}, "unroll")
    share = 1 - 0.5**10
    torch.testing.assert_close(found.grads["w"], 2 * share**2 * TOP, rtol=1e-12, atol=0)
    assert calls["left"] <= 22 and calls["right"] <= 22  # 10 steps each, and not 10 times 10


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([level("top", top_loss, 2, 0, ())], "two levels or more"),
        ([level("a", top_loss, 2, 1, ()), level("a", top_loss, 2, 0, ())], "two levels or more of different names"),
        (
            [level("a", top_loss, 2, 1, ("b",)), level("top", top_loss, 2, 0, ())],
            "level 'a' uses 'b', which is no other",
        ),
        (
            [level("a", top_loss, 2, 0, ()), level("top", top_loss, 2, 0, ())],
            "'a' is below the top, so it needs a rule",
        ),
    ],
)
def test_graphs_are_checked(levels: list[Level], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(levels)
