"""The bilevel problems: known optima, and what each is for, in small."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.tune import Hypers, hypergradient
from metaopt.tune.outer import OuterConfig, OuterResult, run, solve
from metaopt_tasks.problems.maml import MamlSine
from metaopt_tasks.problems.regularisation import LearnedAugmentation, Ridge

SMALL: dict[str, dict[str, Any]] = {
    "hyper_cleaning": {"examples": 50, "inner_steps": 3},
    "sample_selection": {"examples": 50, "inner_steps": 3},
    "layer_decay": {"examples": 50, "inner_steps": 3},
    "parameter_decay": {"examples": 50, "inner_steps": 3},
    "scalar_decay": {"examples": 50, "inner_steps": 3},
    "ridge": {},
    "loss_weighting": {"examples": 100, "inner_steps": 3},
    "learned_augmentation": {"examples": 20, "inner_steps": 3},
    "quadratic_schedule": {},
    "task_schedule": {"steps": 3, "knots": 2, "task": "python_lm_tiny"},
    "maml_sine": {"episodes": 3},
    "toy_cell": {"examples": 50, "inner_steps": 3},
    "data_distillation": {"inner_steps": 3},
    "one_point": {},
}


def problem(name: str, **arguments: Any) -> Any:
    return registry.create("problem", name, **arguments)


def solved(made: Any, **settings: Any) -> OuterResult:
    return solve(made, OuterConfig(**({"method": "unroll", "steps": made.outer_steps, "lr": made.outer_lr} | settings)))


def as_double(hypers: Hypers) -> Hypers:
    return {name: value.double() for name, value in hypers.items()}


def test_every_problem_is_here() -> None:
    assert set(registry.specs("problem")) >= set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_every_problem_has_a_hypergradient_for_all_its_hypers(name: str) -> None:
    made = problem(name, **SMALL[name])
    hypers = made.hypers(Generator().manual_seed(0))
    found = hypergradient(made.inner(0), lambda p, h: made.outer(p, h, 0), hypers, "unroll")
    for key, grad in found.grads.items():
        assert grad.shape == hypers[key].shape
        assert grad.isfinite().all() and grad.abs().max() > 0, key
    # by its repr a resumed run knows its problem
    assert repr(made) == repr(problem(name, **SMALL[name]))


def test_the_learned_schedule_is_chebyshevs() -> None:
    made = problem("quadratic_schedule", steps=4, dimensions=12)
    report = solved(made, steps=300).report
    assert report["excess_ratio"] == pytest.approx(1, abs=1e-9)
    assert report["lr_error"] < 1e-4  # the square root of that, since the excess is flat at its least
    assert report["constant_ratio"] > 2


def test_chebyshevs_steps_do_what_conjugate_gradients_do() -> None:
    # T steps of conjugate gradients give the least excess of any polynomial of degree T, by a theory we did not use
    made = problem("quadratic_schedule")
    curvatures = made._nodes(made.dimensions)
    x, r = torch.zeros_like(curvatures), torch.ones_like(curvatures)
    p = r
    for _ in range(made.steps):
        step = (r @ r) / (p @ (curvatures * p))
        x, new = x + step * p, r - step * curvatures * p
        p, r = new + (new @ new) / (r @ r) * p, new
    torch.testing.assert_close(made.excess({"w": x}), made.best_excess, rtol=1e-10, atol=0)


def test_cleaning_finds_the_wrong_labels() -> None:
    made = problem("hyper_cleaning", examples=200, inner_steps=30, inner_lr=0.5)
    report = solved(made, steps=30, lr=0.3).report
    assert report["f1"] > 0.8  # 0.67 is what calling all of them wrong gives
    assert report["test_accuracy"] > report["noisy"]


def test_weight_decay_of_layers_reaches_less_than_the_best_of_one_for_all() -> None:
    scalar, layers = (problem(f"{per}_decay", examples=50, inner_steps=20) for per in ("scalar", "layer"))
    inner = scalar.inner(0)

    def outer(log: float) -> float:
        hypers = {"all": torch.tensor(log)}
        with torch.no_grad():
            return float(scalar.outer(inner.params(run(inner, hypers)), hypers, 0))

    best = min(outer(log) for log in torch.linspace(-10, 0, 21).tolist())
    losses = [line["outer"] for line in solved(layers, steps=30, lr=0.3).history]
    assert min(losses) < best


def test_ridge_solves_its_inner_problem() -> None:
    made = Ridge(dimensions=5)
    hypers = made.hypers(Generator())
    inner = made.inner(0)
    w = inner.params(inner.start(hypers))["w"]
    x, y = made._parts["inner"]
    slope = x.T @ (x @ w - y) / len(x) + hypers["log_penalty"].exp() * w
    torch.testing.assert_close(slope, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_distorted_images_are_the_images_where_nothing_is_distorted() -> None:
    made = LearnedAugmentation()
    none = {name: torch.full_like(value, -30.0) for name, value in made.hypers(Generator()).items()}
    batch = made.parts["inner"] | {"key": torch.tensor(0)}
    torch.testing.assert_close(made.distorted(batch, none), batch["input"], rtol=0, atol=1e-5)
    # a shift by one pixel, a quarter of half an image, moves the columns
    shifted = made.distorted(batch, none | {"log_shift": torch.tensor([-30.0, 0.0])})
    assert (shifted - batch["input"]).abs().max() > 0.5


def test_maml_differentiates_the_adaptation() -> None:
    made = MamlSine(episodes=4, hidden=(8,), inner_lr=0.1)
    support, query = ((x.double(), y.double()) for x, y in made.points("train", 0, 4))
    start = as_double(made.hypers(Generator().manual_seed(0)))

    def outer(params: Hypers, hypers: Hypers) -> Tensor:
        return made.errors(params, query).mean()

    inner = made.adaptation(support, 1)
    found = hypergradient(inner, outer, start, "unroll").grads
    generator = Generator().manual_seed(1)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in start.items()
    }

    def along(step: float) -> Tensor:
        hypers = {name: value + step * direction[name] for name, value in start.items()}
        return outer(inner.params(run(inner, hypers)), hypers)

    # central differences: their error is of the order 1e-5^2, and ReLU has no kink within that
    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    expected = sum((found[name] * direction[name]).sum() for name in start)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


def test_maml_episodes_are_fresh_and_repeatable() -> None:
    made = MamlSine()
    (x, _), _ = made.points("train", 3, 5)
    assert torch.equal(x, made.points("train", 3, 5)[0][0])
    others = [made.points("train", 4, 5), made.points("test", 3, 5), MamlSine(seed=1).points("train", 3, 5)]
    assert all(not torch.equal(x, other[0][0]) for other in others)


def test_the_cell_of_a_solved_problem_ranks_among_the_enumerated() -> None:
    made = problem("toy_cell", examples=60, inner_steps=10, width=4)
    losses = made.losses_of_cells()
    assert set(losses) == set(itertools.product(range(4), repeat=3))
    # without a way from input to output (edge 1 and one of 0 and 2 are "none") no cell knows more than the classes' shares
    blind = [loss for cell, loss in losses.items() if cell[1] == 0 and 0 in (cell[0], cell[2])]
    assert min(losses.values()) < min(blind) and max(blind) - min(blind) < 1e-6
    best = min(losses, key=losses.__getitem__)
    alphas = torch.zeros(3, 4)
    alphas[torch.arange(3), torch.tensor(best)] = 1.0
    report = made.report({}, {"alphas": alphas})
    assert (report["rank"], report["loss"], report["cells"]) == (1, losses[best], 64)


def test_ten_learned_images_teach_more_than_ten_real_ones() -> None:
    report = solved(problem("data_distillation", inner_steps=10), steps=60).report
    assert report["test_accuracy"] > report["real_images"] + 0.1


def test_a_warm_start_passes_the_bound_of_all_cold_ones() -> None:
    made = problem("one_point")
    warm, cold = (solved(made, steps=n, start=start).report for start, n in (("warm", 1000), ("cold", 100)))
    assert warm["error"] < warm["cold_bound"] < warm["fresh_error"]
    assert cold["error"] >= cold["cold_bound"] - 1e-9


def test_schedules_are_kept_by_the_same_runs_at_each_step() -> None:
    made = problem("task_schedule", steps=3, knots=2, task="python_lm_tiny", holdout_runs=2)
    hypers = made.hypers(torch.Generator())
    assert made.holdout({}, hypers) == made.holdout({}, hypers) != made.holdout({}, {"log_lr": hypers["log_lr"] + 1})


def test_a_schedule_begins_as_asked() -> None:
    made = problem("task_schedule", steps=5, knots=3, initial=(1e-2, 2e-2, 1e-3))
    rates = made.rate(made.hypers(torch.Generator())["log_lr"], 2)
    torch.testing.assert_close(rates, torch.tensor(2e-2))


def test_a_schedule_is_interpolated_between_its_knots() -> None:
    made = problem("task_schedule", steps=5, knots=3)
    logs = torch.tensor([0.0, -1.0, -3.0])
    rates = torch.stack([made.rate(logs, t) for t in range(5)]).log()
    torch.testing.assert_close(rates, torch.tensor([0.0, -0.5, -1.0, -2.0, -3.0]))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hyper_cleaning", {"examples": 5000}, "leave none for tests; take fewer"),
        ("hyper_cleaning", {"corrupted": 1.0}, r"corrupted must be in \[0, 1\), got 1.0"),
        ("hyper_cleaning", {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ("layer_decay", {"per": "neuron"}, "per must be one of parameter, layer, all, got 'neuron'"),
        ("quadratic_schedule", {"steps": 24}, r"steps must be in \[1, 23\], got 24"),
        ("task_schedule", {"knots": 1}, r"knots must be in \[2, 100\], got 1"),
        ("task_schedule", {"initial": (1e-3, 1e-4)}, "initial has 2 learning rates, but knots is 8; give one for each"),
        ("task_schedule", {"holdout_runs": 0}, "holdout_runs must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(name, **arguments).inner(0)


def test_problems_are_values() -> None:
    made = problem("hyper_cleaning")
    assert dataclasses.replace(made, seed=1).parts["inner"]["label"].tolist() != made.parts["inner"]["label"].tolist()
