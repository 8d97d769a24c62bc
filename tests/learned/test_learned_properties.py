"""What every registered learned optimizer promises, whatever it computes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_strategies import Problem, make_problem
from torch import Tensor

from metaopt import registry, tree
from metaopt.learned import LearnedRule, Theta, from_vector, to_vector
from metaopt.resolve import load_theta, save_theta
from metaopt.rule import Context, Params, State
from metaopt.torch_optimizer import RuleOptimizer

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (5,), (5, 4), (3, 5), (2, 3, 2, 2), (2, 1, 2, 1, 3), (0,), (0, 3))
HORIZON = 20
RULES = registry.specs("learned_optimizer")
by_name = pytest.mark.parametrize("name", RULES)


def learned_and_theta(name: str, noise: float = 0.02) -> tuple[LearnedRule, Theta]:
    """Meta-parameters near the initial ones, so that nothing is zero by design."""
    learned: LearnedRule = registry.create("learned_optimizer", name)
    generator = torch.Generator().manual_seed(1)
    theta = learned.init_theta(generator)
    return learned, {key: value + noise * torch.randn(value.shape, generator=generator) for key, value in theta.items()}


def loss_at(params: Params, t: int) -> Tensor:
    """It depends on time and on the parameters."""
    squares = [p.double().square().sum() for p in params.values()]
    return (sum(squares, torch.tensor(0.0)) + 1.0 / (1 + t)).to(next(iter(params.values())).dtype)


def train(learned: LearnedRule, theta: Theta, problem: Problem) -> tuple[Params, State]:
    """Functional steps."""
    params, info = problem.params, problem.info
    state = learned.init(params, info, theta)
    for t, grads in enumerate(problem.grads):
        ctx = Context(info, step=torch.tensor(t), loss=loss_at(params, t), horizon=HORIZON)
        params, state = learned.update(theta, grads, state, params, learned.hp, ctx)
    return params, state


def problem(dtype: torch.dtype, seed: int = 0, zeros: float = 0.2, steps: int = 4) -> Problem:
    return make_problem(None, dtype, SHAPES, steps, seed, zeros, decades=(-2.0, 0.5))  # type: ignore[arg-type]


def layout(state: State) -> Any:
    return tree.map_tree(lambda leaf: (tuple(leaf.shape), leaf.dtype), state)


@by_name
def test_theta_is_float32_and_a_function_of_the_generator(name: str) -> None:
    learned: LearnedRule = registry.create("learned_optimizer", name)
    before = torch.get_rng_state()
    first, again = (learned.init_theta(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in first.values())
    back = from_vector(to_vector(first), first)
    assert all(torch.equal(back[key], first[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@by_name
def test_tensors_of_every_shape_and_dtype_move_and_stay_finite(name: str, dtype: torch.dtype) -> None:
    learned, theta = learned_and_theta(name)
    given = problem(dtype)
    fresh = learned.init(given.params, given.info, theta)
    params, state = train(learned, theta, given)
    assert layout(fresh) == layout(state)
    for key, param in params.items():
        old = given.params[key]
        assert param.shape == old.shape and param.dtype == dtype and param.isfinite().all()
        assert dtype == torch.bfloat16 or not old.numel() or not torch.equal(param, old), "bf16 rounds small steps away"
        assert state[key]["step"].dtype == torch.int64 and int(state[key]["step"]) == len(given.grads)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        slots = [leaf for leaf in state[key].values() if leaf.is_floating_point()]
        assert all(leaf.dtype == wide and leaf.isfinite().all() for leaf in slots)


@by_name
def test_copies_with_a_theta_each_train_as_if_alone(name: str) -> None:
    """float64, so that only an error is larger than the order of summation."""
    learned, theta = learned_and_theta(name)
    thetas = [tree.map_tree(lambda v, k=k: (v * (1 + 0.01 * k)).double(), theta) for k in range(3)]
    alone = [train(learned, thetas[k], problem(torch.float64, seed=k)) for k in range(3)]
    problems = [problem(torch.float64, seed=k) for k in range(3)]

    def one(theta: Theta, params: Params, grads: list[Params]) -> tuple[Params, State]:
        return train(learned, theta, Problem(None, params, tuple(grads)))  # type: ignore[arg-type]

    grads = [tree.stack([p.grads[t] for p in problems]) for t in range(len(problems[0].grads))]
    params, state = torch.vmap(one)(tree.stack(thetas), tree.stack([p.params for p in problems]), grads)
    for k in range(3):
        torch.testing.assert_close(tree.index(params, k), alone[k][0], rtol=1e-9, atol=1e-11)
        pairs = zip(tree.leaves(tree.index(state, k)), tree.leaves(alone[k][1]), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True) for a, b in pairs)


@by_name
def test_copy_that_diverged_touches_no_other(name: str) -> None:
    learned, theta = learned_and_theta(name)
    problems = [problem(torch.float32, seed=k) for k in range(3)]
    params, grads = tree.stack([p.params for p in problems]), [tree.stack([p.grads[0] for p in problems])] * 2
    broken = tree.map_tree(
        lambda g: torch.where(torch.tensor([False, True, False]).view(3, *[1] * (g.dim() - 1)), torch.nan, g), grads[0]
    )
    step = torch.vmap(lambda params, *grads: train(learned, theta, Problem(None, params, grads)))  # type: ignore[arg-type]
    for got, want in zip(step(params, broken, grads[1]), step(params, *grads), strict=True):
        for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])


def meta_loss(learned: LearnedRule, theta: Theta, given: Problem) -> Tensor:
    params, _ = train(learned, theta, given)
    moves = torch.cat([(params[key] - p).reshape(-1) for key, p in given.params.items()])
    return (moves * torch.linspace(0.5, 1.5, len(moves), dtype=moves.dtype)).sum()


@pytest.mark.parametrize("zeros", [0.3, 1.0])
@by_name
def test_zero_gradients_leave_the_meta_gradient_finite(name: str, zeros: float) -> None:
    learned, theta = learned_and_theta(name)
    leaves = {key: value.double().requires_grad_() for key, value in theta.items()}
    value = meta_loss(learned, leaves, problem(torch.float64, zeros=zeros))
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found)


@by_name
def test_meta_gradient_agrees_with_differences(name: str) -> None:
    """Along a random direction; central differences of width 1e-5 are off by 1e-10 (truncation) + 1e-11 (rounding)."""
    learned, theta = learned_and_theta(name)
    like = tree.map_tree(Tensor.double, theta)
    center, given = to_vector(like), problem(torch.float64, zeros=0.0, steps=3)
    direction = torch.randn(center.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = direction / direction.norm()

    def along(s: Tensor) -> Tensor:
        return meta_loss(learned, from_vector(center + s * direction, like), given)

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = along(zero)
    (backward,) = torch.autograd.grad(value, zero)
    width = 1e-5
    with torch.no_grad():
        differences = (along(torch.tensor(width)) - along(torch.tensor(-width))) / (2 * width)
    assert float(differences) != 0
    assert abs(backward - differences) <= 1e-6 * (abs(value.detach()) + abs(differences))


@by_name
def test_as_torch_optimizer_saved_and_resumed_it_is_the_functional_form(name: str, tmp_path: Path) -> None:
    """float64: other orders of summation are allowed, nothing else."""
    learned, theta = learned_and_theta(name)
    rule = load_theta(save_theta(tmp_path / "theta.safetensors", name, learned, theta))
    given = problem(torch.float64)
    params = {key: p.clone().requires_grad_() for key, p in given.params.items()}
    optimizer = RuleOptimizer(rule, list(params.items()), horizon=HORIZON)
    for t, grads in enumerate(given.grads):
        if t == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = RuleOptimizer(rule, list(params.items()), horizon=HORIZON)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for key, p in params.items():
            p.grad = grads[key].clone()
        optimizer.step(loss=loss_at(tree.detach(params), t))
    wanted, _ = train(learned, theta, given)
    torch.testing.assert_close(tree.detach(params), wanted, rtol=1e-10, atol=1e-12)
