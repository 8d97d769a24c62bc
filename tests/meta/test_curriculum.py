"""Which tasks come next."""

from __future__ import annotations

import torch

from metaopt.meta.curriculum import Regret, Uniform, draw

N = 4
REGRET = torch.tensor([0.1, torch.inf, -0.2, 0.5], dtype=torch.float64)
AGE = torch.tensor([1, 10, 6, 3])


def test_regret_weights_are_those_of_the_formula() -> None:
    rank = torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=torch.float64)  # by hand; a task never taken comes first
    by_rank = rank**-2 / (rank**-2).sum()
    expected = 0.2 / N + 0.8 * (0.7 * by_rank + 0.3 * AGE / 20)
    weights = Regret(temperature=0.5, staleness=0.3, floor=0.2).weights(REGRET, AGE)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))


def test_every_task_keeps_its_floor_even_where_only_the_greatest_regret_counts() -> None:
    """Else a task that once did well is never seen again, however badly it does later."""
    weights = Regret(temperature=1e-3, staleness=0.0, floor=0.2).weights(REGRET, AGE)
    torch.testing.assert_close(weights, torch.tensor([0.05, 0.85, 0.05, 0.05], dtype=torch.float64))


def test_tasks_are_drawn_by_weight_without_repetition_as_a_function_of_seed_and_step() -> None:
    weights = torch.tensor([1.0, 2.0, 1.0, 4.0], dtype=torch.float64)
    singles = torch.tensor([draw(weights, 1, seed=3, step=step) for step in range(4000)]).flatten()
    share = singles.bincount(minlength=N) / len(singles)
    assert (share - weights / 8).abs().max() < 4 * (0.25 / 4000) ** 0.5  # four standard errors
    pairs = [draw(weights, 2, seed=3, step=step) for step in range(50)]
    assert all(a < b for a, b in pairs)
    assert pairs == [draw(weights, 2, seed=3, step=step) for step in range(50)]
    assert pairs != [draw(weights, 2, seed=4, step=step) for step in range(50)]
    assert draw(Uniform().weights(REGRET, AGE), N, seed=0, step=0) == [0, 1, 2, 3]
