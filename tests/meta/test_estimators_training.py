"""Estimators on training runs of a learned optimizer: against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from metaopt import registry, tree
from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import copy_noise, episode_seeds
from metaopt.meta.inner import TrainingRuns
from metaopt.meta.truncation import Constant
from metaopt.random import normal
from metaopt.rule import Params
from metaopt.task import Batch, Split, Task
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.estimators.forward import ForwardGradient
from metaopt_learned.estimators.full_es import FullES
from metaopt_learned.estimators.nres import NRES
from metaopt_learned.estimators.unroll import FullUnroll, TruncatedUnroll

STEPS, COPIES = 12, 3


class Bowl(Task):
    """0.5 h (W - noise)^2 in float64, so that finite differences are good to ten digits."""

    stochastic = True

    def init(self, generator: Generator) -> Params:
        return {
            "w": torch.randn(3, 2, generator=generator, dtype=torch.float64),
            "b": torch.randn(2, generator=generator, dtype=torch.float64),
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        noise = normal(batch["random"], (3, 2), dtype=torch.float64)
        scales = torch.linspace(0.5, 3.0, 6, dtype=torch.float64).reshape(3, 2)
        return (0.5 * scales * (params["w"] - 0.1 * noise) ** 2).sum() + 0.5 * params["b"].square().sum()


@pytest.fixture(scope="module")
def problem() -> tuple[TrainingRuns, Theta]:
    learned = AdafacMLP(hidden=3, step_scale=0.3)
    theta = learned.init_theta(torch.Generator().manual_seed(1))
    for value in theta.values():  # zero biases put units of the second layer exactly on the kink of their ReLU
        value += 0.1 * torch.randn(value.shape, generator=Generator().manual_seed(2))
    task = Bowl("bowl", Split(), Split(), Split(), batch_size=1)
    return TrainingRuns(task, learned, Constant(STEPS)), {name: value.double() for name, value in theta.items()}


def first_window(inner: TrainingRuns, theta: Theta, steps: int, episode: int) -> Tensor:
    """Losses [COPIES, steps] of the runs that estimators with seed 0 begin with."""
    seeds = episode_seeds(0, torch.arange(COPIES), episode)
    thetas = from_vector(to_vector(theta).expand(COPIES, -1), theta)
    with torch.no_grad():
        return inner.run(thetas, inner.start(thetas, seeds, inner.lengths(seeds, 0)), steps)[0]


def by_finite_differences(inner: TrainingRuns, theta: Theta, steps: int, episode: int, along: Tensor) -> Tensor:
    """Derivatives of the mean losses [COPIES] along a direction."""
    center, h = to_vector(theta), 1e-6  # h^2 of truncation and 1e-16 / h of rounding
    plus, minus = (
        first_window(inner, from_vector(center + sign * h * along, theta), steps, episode).mean(1) for sign in (1, -1)
    )
    return (plus - minus) / (2 * h)


@pytest.mark.parametrize("kind", ["full", "truncated"])
def test_backpropagation_equals_finite_differences(kind: str, problem: tuple[TrainingRuns, Theta]) -> None:
    inner, theta = problem
    estimator: Any = (
        FullUnroll(copies=COPIES) if kind == "full" else TruncatedUnroll(copies=COPIES, window=7, stagger=False)
    )
    steps, episode = (STEPS, 0) if kind == "full" else (7, 1)
    gradient, _, metrics = estimator.estimate(inner, theta, estimator.start(inner, theta, seed=0))
    found = to_vector(gradient)
    assert metrics["meta_loss"] == pytest.approx(float(first_window(inner, theta, steps, episode).mean()), rel=1e-12)
    for direction in torch.randn(5, len(found), generator=Generator().manual_seed(0), dtype=torch.float64):
        slope = by_finite_differences(inner, theta, steps, episode, direction).mean()
        assert float(found @ direction) == pytest.approx(float(slope), rel=1e-6, abs=1e-8 * float(found.norm()))


@pytest.mark.parametrize("segment", [1, 2, 5, 12])
def test_boundary_checkpointing_equals_one_graph(segment: int, problem: tuple[TrainingRuns, Theta]) -> None:
    inner, theta = problem
    seeds = episode_seeds(0, torch.arange(COPIES), 0)
    leaf = to_vector(theta).requires_grad_()
    thetas = from_vector(leaf.expand(COPIES, -1), theta)
    losses, _ = inner.run(thetas, inner.start(thetas, seeds, inner.lengths(seeds, 0)), STEPS)
    (whole,) = torch.autograd.grad(losses.mean(), leaf)
    estimator = FullUnroll(copies=COPIES, segment=segment)
    gradient, _, _ = estimator.estimate(inner, theta, estimator.start(inner, theta, seed=0))
    torch.testing.assert_close(to_vector(gradient), whole, rtol=1e-12, atol=1e-12 * float(whole.abs().max()))


def test_forward_gradient_is_the_directional_derivative_across_windows(problem: tuple[TrainingRuns, Theta]) -> None:
    inner, theta = problem
    estimator = ForwardGradient(copies=COPIES, window=STEPS // 3, stagger=False)
    carry = estimator.start(inner, theta, seed=0)
    found = []
    for _ in range(3):
        gradient, carry, _ = estimator.estimate(inner, theta, carry)
        found.append(to_vector(gradient))
    torch.testing.assert_close(torch.stack(found).mean(0), _along_noise(inner, theta, 1), rtol=1e-6, atol=1e-7)


def _along_noise(inner: TrainingRuns, theta: Theta, episode: int) -> Tensor:
    """Mean over copies of (slope along v) v, for the noise v of this episode."""
    noise = copy_noise(0, episode, torch.arange(COPIES), len(to_vector(theta)), to_vector(theta))
    slopes = [by_finite_differences(inner, theta, STEPS, episode, v)[i] for i, v in enumerate(noise)]
    return (torch.stack(slopes)[:, None] * noise).mean(0)


@pytest.mark.parametrize(
    ("strategy", "episode"),
    [(NRES(pairs=COPIES, window=STEPS, sigma=1e-6, stagger=False), 1), (FullES(pairs=COPIES, sigma=1e-6), 0)],
)
def test_small_perturbations_give_the_directional_derivative(
    strategy: Any, episode: int, problem: tuple[TrainingRuns, Theta]
) -> None:
    inner, theta = problem
    gradient, _, _ = strategy.estimate(inner, theta, strategy.start(inner, theta, seed=0))
    torch.testing.assert_close(to_vector(gradient), _along_noise(inner, theta, episode), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(registry.specs("estimator")))
def test_every_estimator_runs_on_a_task_of_the_suite(name: str) -> None:
    learned = AdafacMLP(hidden=2)
    theta = learned.init_theta(torch.Generator().manual_seed(0))
    family = registry.create("task", "quadratic", dim=4)
    inner = TrainingRuns(family.sample(torch.Generator().manual_seed(0)), learned, Constant(6))
    counted = "copies" if "unroll" in name or "forward" in name else "pairs"
    estimator = registry.create("estimator", name, **{counted: 2})
    carry = estimator.start(inner, theta, seed=0)
    for _ in range(2):
        gradient, carry, metrics = estimator.estimate(inner, theta, carry)
        assert all(g.shape == theta[key].shape and g.dtype == torch.float32 for key, g in gradient.items())
        assert torch.isfinite(to_vector(gradient)).all()
        assert to_vector(gradient).abs().max() > 0
        assert metrics["diverged"] == 0
        assert not any(leaf.requires_grad for leaf in tree.leaves(carry))
    steps = 2 * (6 if name.startswith("full") else 20)
    assert metrics["inner_steps"] == steps * (1 if counted == "copies" else 4 if name == "pes_analytic" else 2)


def test_judging_averages_fresh_batches_alike_for_copies_of_one_seed() -> None:
    task = registry.create("task", "digits_mlp")
    learned = AdafacMLP(hidden=2)
    theta = from_vector(
        to_vector(learned.init_theta(torch.Generator().manual_seed(0))).expand(3, -1),
        learned.init_theta(torch.Generator().manual_seed(0)),
    )
    inner = TrainingRuns(task, learned, Constant(3), judge_batches=64)
    seeds = torch.tensor([5, 5, 6])
    with torch.no_grad():
        state = inner.start(theta, seeds, inner.lengths(seeds, 0))
        judged = inner.judge(theta, state)
        params = state["run"]["params"]
        whole = torch.stack(
            [
                task.normalize(task.loss(tree.index(params, k), task.train.take(torch.arange(len(task.train)))))
                for k in range(3)
            ]
        )
        dead = {**state, "run": {**state["run"], "alive": torch.tensor([True, False, True])}}
        assert torch.isnan(inner.judge(theta, dead)).tolist() == [False, True, False]
    assert judged[0] == judged[1] != judged[2]
    torch.testing.assert_close(judged, whole, rtol=0.02, atol=0)  # 4096 draws of 64
