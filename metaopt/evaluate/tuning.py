"""The learning rate of one contender on one task, under the budget that every contender gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from metaopt.evaluate.course import Course
from metaopt.rule import UpdateRule
from metaopt.space import Hyper

POINTS_PER_ROUND = 2
VALID_EXAMPLES = 2048
"""At most so many examples of the valid split, the same for all."""


@dataclass(frozen=True)
class Trial:
    """One learning rate: its normalised valid loss for each tuning seed, and how many of those runs diverged."""

    lr: float
    scores: list[float]
    diverged: int

    @property
    def score(self) -> float:
        """Mean over tuning seeds."""
        return math.fsum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Tuning:
    """The outcome.

    Attributes:
        lr: the best of ``trials``; of equals, the smallest.
        edge: whether it is still the smallest or largest one tried: the optimum may lie outside.
        extended: rounds that went beyond the declared range.
        runs: training runs spent.
        trials: everything tried, by learning rate.
    """

    lr: float
    edge: bool
    extended: int
    runs: int
    trials: list[Trial]


def tune_lr(
    course: Course,
    rule: UpdateRule,
    seeds: list[int],
    grid: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> Tuning | None:
    """Search the learning rate: ``grid`` points at once, then ``rounds`` times `POINTS_PER_ROUND` more.

    A round refines between the best point and its neighbours, or, if the best point is the first or last, goes on
    outwards with the grid's own ratio. Every contender thus trains the same number of runs, wherever its optimum lies.

    Args:
        course: what to train on.
        rule: the contender.
        seeds: every learning rate is tried with each of them.
        grid: number of points over the declared search range; 0 keeps the contender's own learning rate.
        rounds: further rounds.
        advance: called after every unroll.

    Returns:
        None if the rule declares no ``lr``, or ``grid`` is 0.

    Raises:
        ValueError: the declared range cannot be spread on a log scale.
    """
    declared = rule.declared().get("lr")
    if not isinstance(declared, Hyper) or not grid:
        return None
    lrs = declared.grid(grid)
    if min(lrs) <= 0 or declared.scale != "log":
        raise ValueError(
            f"lr of {type(rule).__name__} must be declared on a log scale with a positive search range to be tuned; "
            f"use metaopt.space.learning_rate(default, search=(low, high))"
        )
    ratio = lrs[1] / lrs[0]
    trials = _try(course, rule, seeds, lrs)
    advance()
    extended = 0
    for _ in range(rounds):
        more, outwards = _more(trials, ratio, declared)
        trials = sorted(trials + _try(course, rule, seeds, more), key=lambda trial: trial.lr)
        extended += outwards
        advance()
    best = _best(trials)
    return Tuning(trials[best].lr, best in (0, len(trials) - 1), extended, len(trials) * len(seeds), trials)


def _try(course: Course, rule: UpdateRule, seeds: list[int], lrs: list[float]) -> list[Trial]:
    """All learning rates with all seeds, as one unroll of ``len(lrs) * len(seeds)`` copies."""
    copies = seeds * len(lrs)
    carry = course.start(rule, copies)
    lr = torch.tensor(lrs, dtype=torch.float64, device=course.device).repeat_interleave(len(seeds))
    _, carry = course.train(rule, carry, course.steps, {"lr": lr})
    losses = course.losses(carry, course.task.valid, VALID_EXAMPLES)
    scores = course.scores(losses, copies).reshape(len(lrs), len(seeds)).tolist()
    dead = losses.isnan().reshape(len(lrs), len(seeds)).sum(dim=1).tolist()
    return [Trial(lr, row, count) for lr, row, count in zip(lrs, scores, dead, strict=True)]


def _best(trials: list[Trial]) -> int:
    return min(range(len(trials)), key=lambda i: (trials[i].score, trials[i].lr))


def _more(trials: list[Trial], ratio: float, declared: Hyper) -> tuple[list[float], bool]:
    """The next learning rates, and whether they go outwards."""
    lrs = [trial.lr for trial in trials]
    at = _best(trials)
    if 0 < at < len(lrs) - 1:
        return [math.sqrt(lrs[at] * lrs[at - 1]), math.sqrt(lrs[at] * lrs[at + 1])], False
    factor, inner = (1 / ratio, lrs[1]) if at == 0 else (ratio, lrs[-2])
    outer = [lrs[at] * factor**i for i in range(1, POINTS_PER_ROUND + 1)]
    if all(declared.contains(lr) and lr > 0 for lr in outer):
        return outer, True
    return [lrs[at] * (inner / lrs[at]) ** (i / 3) for i in (1, 2)], False  # the domain ends here: refine inwards
