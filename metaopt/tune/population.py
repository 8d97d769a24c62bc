"""Methods of populations: hyperparameters that change during training, from many runs that train in lock-step.

- `population_based_training` moves hyperparameters while a population trains: the worst copy the best and try others.
- `cross_entropy` fits a distribution over whole schedules to the best of a population that is trained from the start each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metaopt import registry
from metaopt.evaluate.course import seed_streams
from metaopt.evaluate.report import plain
from metaopt.evaluate.statistics import Estimate, estimate
from metaopt.evaluate.tuning import VALID_EXAMPLES
from metaopt.files import write_atomic
from metaopt.learned import BoundRule, LearnedRule, Theta, from_vector, to_vector
from metaopt.resolve import THETA_FILE, save_theta
from metaopt.tune.lockstep import LOOK_EXAMPLES, stacked_values, taken
from metaopt.tune.search_space import ALL, Dimension
from metaopt.tune.tuning import Problem, TuneConfig, check_directory, study_name

POPULATION = 32
FACTORS = (0.8, 1.25)
"""What explored values are multiplied by, in the numbers that the space samples (1 - beta of a decay)."""

CONFIRM_SEEDS = 8
FILES = {"pbt": "pbt.json", "cross-entropy": "cross_entropy.json"}


@dataclass(frozen=True)
class Schedule:
    """Values of the rule's hyperparameters, one after the other, and what they are worth.

    Attributes:
        values: for each budget unit (of PBT), or knot (of cross-entropy).
        valid: normalised valid loss from fresh seeds.
        constant: the same of the rule's own values.
        runs: training runs that the search made.
    """

    values: list[dict[str, Any]]
    valid: Estimate
    constant: Estimate
    runs: int


def run(method: str, config: TuneConfig, directory: Path) -> str:
    """Search by ``pbt`` or ``cross-entropy``, write what was found, and say it in one line.

    Raises:
        ValueError: another method, a space that the method cannot search, or a directory with the result of another search.
    """
    if method not in FILES:
        raise ValueError(f"method must be optuna, {' or '.join(FILES)}, got {method!r}")
    path, study = directory / FILES[method], study_name(config)
    check_directory(path, study)
    if method == "pbt":
        found = population_based_training(Problem(config), min(POPULATION, config.trials))
        next_step = "the values of every budget unit are in"
    else:
        found, learned, theta = cross_entropy(config)
        save_theta(directory / THETA_FILE, "learned_schedule", learned, theta)
        next_step = f"next: metaopt race {directory} {config.optimizer} --tasks {config.task}; settings are in"
    write_atomic(path, json.dumps({"study": study, **plain(asdict(found))}, indent=1) + "\n")
    gain = (
        f"valid loss {found.valid.iqm:.4g} [{found.valid.low:.4g}, {found.valid.high:.4g}] from fresh seeds, constant "
    )
    return f"{gain}defaults {found.constant.iqm:.4g} [{found.constant.low:.4g}, {found.constant.high:.4g}]; {next_step} {path}"


def population_based_training(problem: Problem, population: int = POPULATION) -> Schedule:
    """Population-based training (Jaderberg et al., 2017, arXiv:1711.09846), each member one run per seed.

    After every budget unit but the last, members of the worst quarter take over parameters, state and hyperparameters of one
    of the best quarter, and multiply the latter by one of `FACTORS`. The result is the schedule of the best member's line,
    trained again from fresh seeds: the value that the search saw is of the seeds that it chose by.

    Raises:
        ValueError: fewer than 4 members, or choices in the space, which a run cannot change on its way.
    """
    if population < 4:
        raise ValueError(f"a population needs at least 4 members, got {population}; give more trials")
    odd = [item.label for item in problem.space.dimensions if item.kind in ("choice", "int")]
    if odd:
        raise ValueError(f"pbt moves numbers during training, which {odd[0]} is not; leave it out of the search")
    course, each, rng = problem.course, len(problem.seeds), random.Random(f"pbt {problem.config.seed}")
    length, quarter = course.steps // problem.units, population // 4
    params = [_drawn(problem, rng) for _ in range(population)]
    lines: list[list[dict[str, Any]]] = [[] for _ in range(population)]
    carry = course.start(problem.rule, problem.seeds * population)
    for unit in range(problem.units):
        values = [problem.space.values(point) for point in params]
        for line, own in zip(lines, values, strict=True):
            line.append(own)
        _, carry = course.train(problem.rule, carry, length, stacked_values(problem.rule, values, each))
        last = unit == problem.units - 1
        losses = course.losses(carry, course.task.valid, VALID_EXAMPLES if last else LOOK_EXAMPLES)
        scores = course.scores(losses, problem.seeds * population).reshape(population, each).mean(1)
        order = scores.argsort(stable=True).tolist()
        if last:
            break
        source = list(range(population))
        for member in order[-quarter:]:
            source[member] = rng.choice(order[:quarter])
        params = [params[s] if s == m else _explored(problem, params[s], rng) for m, s in enumerate(source)]
        lines = [list(lines[s]) for s in source]
        carry = taken(carry, source, each)
    best = lines[order[0]]
    fresh = seed_streams(problem.config.seed, course.name, each + CONFIRM_SEEDS, 0)[0][each:]
    constant: list[dict[str, Any]] = [{}] * problem.units
    return Schedule(best, _replayed(problem, best, fresh), _replayed(problem, constant, fresh), population * each)


def _drawn(problem: Problem, rng: random.Random) -> dict[str, float]:
    point = {}
    for item in problem.space.dimensions:
        low, high = sorted((item.sampled(item.low), item.sampled(item.high)))
        share = rng.random()
        point[item.label] = low + (high - low) * share if item.kind == "linear" else low * (high / low) ** share
    return point


def _explored(problem: Problem, point: Mapping[str, float], rng: random.Random) -> dict[str, float]:
    def within(item: Dimension, sampled: float) -> float:
        low, high = sorted((item.sampled(item.low), item.sampled(item.high)))
        return min(max(sampled, low), high)

    return {item.label: within(item, point[item.label] * rng.choice(FACTORS)) for item in problem.space.dimensions}


def _replayed(problem: Problem, schedule: list[dict[str, Any]], seeds: list[int]) -> Estimate:
    """Valid loss of fresh runs under values that change from unit to unit."""
    course = problem.course
    carry = course.start(problem.rule, seeds)
    for values in schedule:
        hp = stacked_values(problem.rule, [values], len(seeds))
        _, carry = course.train(problem.rule, carry, course.steps // problem.units, hp)
    return estimate([course.scores(course.losses(carry, course.task.valid, VALID_EXAMPLES), seeds).tolist()])


def cross_entropy(
    config: TuneConfig, *, population: int = POPULATION, knots: int = 5, spread: float = 0.7, smoothing: float = 0.7
) -> tuple[Schedule, LearnedRule, Theta]:
    r"""Cross-entropy method over schedules: the theta of the learned optimizer ``learned_schedule``.

    Each generation draws ``population`` schedules from :math:`N(\mu, \sigma^2)`, trains with each, and moves both to the mean
    and deviation of the best fifth: :math:`\mu \leftarrow (1 - a) \mu + a \bar\theta_{best}`, a = ``smoothing``.
    Rubinstein and Kroese, 2004 (https://doi.org/10.1007/978-1-4757-4321-0).

    Args:
        config: ``trials`` schedules in all, ``search``: hyperparameters that have one each (default lr); the rest as it says.
        population: schedules of a generation.
        knots: of each schedule, evenly over the horizon; linear between them on the scale of the hyperparameter.
        spread: first standard deviation, on that scale (0.7: a factor of 2).
        smoothing: a.

    Returns:
        what was found, and the learned optimizer with its theta, which `metaopt.resolve.save_theta` writes.

    Raises:
        ValueError: fewer trials than ``population``, an optimizer that is not registered, wrappers, or a hyperparameter that
            cannot have a schedule.
    """
    if config.trials < population:
        raise ValueError(
            f"cross-entropy trains {population} schedules at a time, got {config.trials} trials; give more"
        )
    if config.wrappers or config.fixed:
        raise ValueError(
            "cross-entropy searches schedules of a registered optimizer as it is; leave --schedule and --set out"
        )
    names = ("lr",) if config.search == (ALL,) else config.search
    learned: LearnedRule = registry.create(
        "learned_optimizer", "learned_schedule", rule=config.optimizer, learned=",".join(names), knots=knots
    )
    problem = Problem(TuneConfig(config.optimizer, config.task, seeds=config.seeds, steps=config.steps, seed=config.seed,
                                 device=config.device, backend=config.backend))  # fmt: skip
    course, each = problem.course, len(problem.seeds)
    generator = torch.Generator().manual_seed(config.seed)
    first = learned.init_theta(generator)
    mean = to_vector(first).double()
    deviation = torch.full_like(mean, spread)
    generations, fifth = config.trials // population, max(2, population // 5)
    for _ in range(generations):
        drawn = mean + deviation * torch.randn(population, len(mean), generator=generator, dtype=torch.float64)
        seeds = problem.seeds * population
        scores = _scores(problem, learned, from_vector(drawn.float().repeat_interleave(each, 0), first), seeds, True)
        best = drawn[scores.reshape(population, each).mean(1).argsort(stable=True)[:fifth]]
        mean = (1 - smoothing) * mean + smoothing * best.mean(0)
        deviation = (1 - smoothing) * deviation + smoothing * best.std(0)
    theta = from_vector(mean.float(), first)
    fresh = seed_streams(config.seed, course.name, each + CONFIRM_SEEDS, 0)[0][each:]
    found, constant = (estimate([_scores(problem, learned, t, fresh, False).tolist()]) for t in (theta, first))
    at_knots = [{name: values[i].tolist() for name, values in theta.items()} for i in range(knots)]
    return Schedule(at_knots, found, constant, generations * population * each), learned, theta


def _scores(problem: Problem, learned: LearnedRule, theta: Theta, seeds: list[int], stacked: bool) -> torch.Tensor:
    course = problem.course
    rule = BoundRule(learned, {name: value.to(course.device) for name, value in theta.items()}, stacked)
    _, carry = course.train(rule, course.start(rule, seeds), course.steps, None)
    return course.scores(course.losses(carry, course.task.valid, VALID_EXAMPLES), seeds)
