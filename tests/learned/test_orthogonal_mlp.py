"""Celo2's class with a schedule: where it starts, what its schedule does, and what it orthogonalises."""

from __future__ import annotations

import pytest
import torch

from metaopt.rule import Context, infer_info
from metaopt_learned.orthogonal_mlp import OrthogonalMLP


def _step(rule: OrthogonalMLP, theta: dict, params: dict, grads: list[dict], step: int = 0, horizon: int = 100) -> dict:
    """Parameters after one update per entry of ``grads``, at lr 0.01."""
    info = infer_info(params)
    state = rule.init(params, info, theta)
    for t, grad in enumerate(grads):
        ctx = Context(info, step=torch.tensor(step + t), horizon=horizon)
        params, state = rule.update(theta, grad, state, params, {"lr": 0.01, "weight_decay": 0.0}, ctx)
    return params


def _problem(shape: tuple[int, ...]) -> tuple[dict, list[dict]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    return {"w": draw[0]}, [{"w": grad} for grad in draw[1:]]


def test_untrained_it_is_adams_direction_with_linear_decay() -> None:
    """Against the formula by hand: m / sqrt(v + 1e-8) of a vector, scaled to RMS 1."""
    rule = OrthogonalMLP()
    theta = {name: value.double() for name, value in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    params, grads = _problem((7,))
    got = _step(rule, theta, params, grads, step=30)["w"]
    m = v = torch.zeros(7, dtype=torch.float64)
    want = params["w"]
    for t, grad in enumerate(grads):
        m, v = 0.9 * m + 0.1 * grad["w"], 0.95 * v + 0.05 * grad["w"] ** 2
        direction = m / (v + 1e-8).sqrt()
        want = want - 0.01 * (1 - (30 + t) / 100) * direction / direction.square().mean().sqrt()
    assert (got - want).abs().max() < 1e-6 * (want - params["w"]).abs().max()  # the eps of normalisers


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 2, 2)])
def test_steps_of_matrices_are_orthogonal_and_of_size_lr(shape: tuple[int, ...]) -> None:
    rule = OrthogonalMLP(start="random")
    theta = {name: value.double() for name, value in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    params, grads = _problem(shape)
    moved = (_step(rule, theta, params, grads[:1])["w"] - params["w"]).flatten(1)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-6)
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 2.5  # five Newton-Schulz steps move singular values to about 0.7 .. 1.2


def test_the_schedule_multiplies_the_linear_decay() -> None:
    rule = OrthogonalMLP(knots=3)
    theta = {name: value.double() for name, value in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    scheduled = {**theta, "schedule": torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)}
    params, grads = _problem((6, 4))
    plain, other = (_step(rule, t, params, grads[:1], step=25)["w"] - params["w"] for t in (theta, scheduled))
    assert torch.allclose(other, plain * torch.e**0.5, rtol=1e-9)  # a quarter of the way is half-way to the middle knot


def test_a_start_that_needs_two_units_says_so() -> None:
    with pytest.raises(ValueError, match="two hidden units"):
        OrthogonalMLP(hidden=1).init_theta(torch.Generator())
