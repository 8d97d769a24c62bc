"""Reinforcement learning: the environments' physics and values, and the gradient that trains policies in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.func import grad, vmap

from metaopt.random import step_keys
from metaopt_tasks.reinforcement import LAYOUTS, GridWorld, advantages, cartpole, gridworld, world


def test_advantages_compare_an_episode_with_the_others() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [4.0, 0.0, 0.0]])
    returns, advantage = advantages(rewards, discount=0.5)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 0.0, 2.0], [4.0, 0.0, 0.0]]))
    torch.testing.assert_close(advantage, torch.tensor([[2.0, -2.5, 0.5], [4.0, -2.0, -2.0]]))


# Cart-pole


@pytest.mark.parametrize("pole", [0.5, 1.0])
def test_cart_pole_obeys_the_lagrangian_of_a_uniform_pole_on_a_cart(pole: float) -> None:
    task = cartpole(pole=pole)
    generator = Generator().manual_seed(0)
    state = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    push = 10 * torch.randn(20, generator=generator, dtype=torch.float64)
    rates = task.acceleration(state, push).numpy()
    for (_, speed, angle, spin), force, rate in zip(state.numpy(), push.numpy(), rates, strict=True):
        coupling = 0.1 * pole * math.cos(angle)
        mass = np.array([[1.1, coupling], [coupling, 4 / 3 * 0.1 * pole**2]])
        forces = [force + 0.1 * pole * math.sin(angle) * spin**2, 0.1 * 9.8 * pole * math.sin(angle)]
        cart, turn = np.linalg.solve(mass, forces)
        np.testing.assert_allclose(rate, [speed, cart, spin, turn], rtol=1e-12)


def test_an_episode_earns_one_per_step_until_the_pole_first_falls() -> None:
    task = cartpole(steps=50)
    right = {"head.weight": torch.zeros(1, 4), "head.bias": torch.full((1,), 30.0)}
    states, rights, rewards = task.play(right, torch.zeros(3, 4), torch.tensor(0))
    assert bool(rights.all()) and states.shape == (50, 3, 4) and rewards.shape == (50, 3)
    # pushed one way from rest, the pole passes 12 degrees after 9 steps of the usual cart-pole
    assert rewards.sum(0).tolist() == [8.0, 8.0, 8.0]
    assert bool((rewards[:-1] >= rewards[1:]).all())


def test_pushing_at_random_scores_about_one_and_never_falling_zero() -> None:
    task = cartpole()
    even = {"head.weight": torch.zeros(1, 4), "head.bias": torch.zeros(1)}
    batch = task.valid.take(torch.arange(256)) | {"random": torch.tensor(17)}
    assert float(task.normalize(task.loss(even, batch))) == pytest.approx(1.0, abs=0.1)
    assert float(task.normalize(torch.tensor(-50.0))) == 0.0


def test_policy_gradient_learns_to_balance_the_pole() -> None:
    task = cartpole()
    params = {name: p.requires_grad_() for name, p in task.init(Generator().manual_seed(0)).items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.3)
    for step in range(50):
        rows = torch.randint(len(task.train), (32,), generator=Generator().manual_seed(step))
        optimizer.zero_grad()
        task.training_loss(params, {}, task.train.take(rows) | {"random": torch.tensor(step)})[0].backward()
        optimizer.step()
    batch = task.test.take(torch.arange(256)) | {"random": torch.tensor(-1)}
    assert task.normalize(task.loss(params, batch)).item() < 0.2


# Grid worlds


def uniform_policy(task: GridWorld) -> Tensor:
    return torch.full((len(task.config["gain"]), 4), 0.25, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_of_a_long_episode_solves_bellmans_equation(layout: str) -> None:
    task = gridworld(layout=layout, steps=600, discount=0.95, slip=0.2)
    policy = torch.rand(len(task.config["gain"]), 4, generator=Generator().manual_seed(1), dtype=torch.float64)
    policy = policy / policy.sum(1, keepdim=True)
    moves, ends = task.config["moves"].numpy(), task.config["ends"].numpy()
    arrive = task.config["gain"].double().numpy() - task.cost
    cells = len(ends)
    chain, reward = np.zeros((cells, cells)), np.zeros(cells)
    for cell in np.flatnonzero(ends == 0):
        for move in range(4):
            chance = 0.8 * float(policy[cell, move]) + 0.2 / 4
            chain[cell, moves[cell, move]] += chance
            reward[cell] += chance * arrive[moves[cell, move]]
    expected = np.linalg.solve(np.eye(cells) - 0.95 * chain, reward)
    np.testing.assert_allclose(task.value(policy, {}), expected, rtol=1e-6, atol=1e-9)


def test_best_value_of_an_open_grid_is_that_of_the_shortest_path() -> None:
    task = gridworld(layout="open", slip=0.0, cost=0.01, discount=0.9)
    expected = 0.9**7 - 0.01 * sum(0.9**t for t in range(8))  # eight moves from corner to corner
    assert task.best_value() == pytest.approx(expected, abs=1e-6)
    assert task.floor == pytest.approx(-expected, abs=1e-6)


def test_walking_at_random_scores_one() -> None:
    for layout in LAYOUTS:
        task = gridworld(layout=layout)
        loss = -task.value(uniform_policy(task), {})[0]
        assert float(task.normalize(loss)) == pytest.approx(1.0, abs=1e-6)


def test_mean_return_of_played_episodes_is_the_exact_value() -> None:
    task = gridworld(layout="cliff", slip=0.3, batch_size=4000, steps=15)
    log_policy = torch.randn(len(task.config["gain"]), 4, generator=Generator().manual_seed(0)).log_softmax(1)
    _, _, rewards, _ = task.play(log_policy, {"random": torch.tensor(3)})
    returns, _ = advantages(rewards, task.discount)
    exact = float(task.value(log_policy.exp(), {})[0])
    error = float(returns[0].std()) / math.sqrt(4000)
    assert abs(float(returns[0].mean()) - exact) < 4 * error


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_the_policy_gradient_is_unbiased(hidden: tuple[int, ...]) -> None:
    """Its mean over many keys is the gradient of the exact expected return, in every coordinate."""
    task = gridworld(layout="bridge", hidden=hidden, batch_size=6, steps=8, slip=0.2)
    params = task.init(Generator().manual_seed(2))
    exact = grad(lambda p: task.loss(p, {}))(params)
    keys = step_keys(torch.tensor(0), torch.arange(6000))
    samples = vmap(grad(lambda p, key: task.training_loss(p, {}, {"random": key})[0]), in_dims=(None, 0))(params, keys)
    for name, sample in samples.items():
        error = sample.std(0) / math.sqrt(len(keys))
        assert bool(((sample.mean(0) - exact[name]).abs() <= 4.5 * error + 1e-6).all()), name


def test_layouts_without_start_or_goal_are_refused() -> None:
    with pytest.raises(ValueError, match="one start S and a goal G"):
        world(("...", "..G"))
    with pytest.raises(ValueError, match="layout must be one of open"):
        gridworld(layout="labyrinth")
