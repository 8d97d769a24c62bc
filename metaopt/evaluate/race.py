"""The fair race: every contender gets the same tasks, seeds, steps and tuning budget; divergence is counted.

Protocol, for each contender on each task:

1. **Tuning.** A contender that declares ``lr`` has it tuned, and nothing else: ``grid`` points spread over its declared
   search range, then ``rounds`` further rounds of two points, which refine around the best point or, where it is an
   end of what was tried, go on outwards. The number of training runs is the same for all, whether they refine or
   extend: ``(grid + 2 * rounds) * tune_seeds``, each as long as the final runs, all points of a round being one
   vmapped unroll. A learning rate is scored by the normalised loss on the *valid* split at the end of training, mean
   over the tuning seeds, a diverged run counting as the worst loss there is. If the best point is an end even then,
   the result says ``edge: true``: the contender may be better than it looks. A contender without ``lr`` (a learned or
   parameter-free optimizer) is run as it is and spends no tuning runs, which the result says as well.
2. **Final runs.** The tuned learning rate trains from ``seeds`` fresh seeds, disjoint from the tuning seeds, and is
   scored on the *test* split, once, after the last step. No checkpoint is chosen.
3. **Report.** Raw test losses per task and normalised ones over all tasks, as interquartile means with stratified
   bootstrap intervals (`metaopt.evaluate.statistics`), the number of diverged runs, every score and every curve.

A seed fixes initial parameters and the stream of batches, and depends on the race's seed and the task's name alone: all
contenders start from the same points and see the same batches, and neither their order nor the other tasks change a
number. On a task family each seed draws a member, so tuning sees other members than the final runs.

What it does not do: tune weight decay, betas or schedules; equalise wall-clock or memory per step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metaopt import registry
from metaopt.evaluate.baseline import baseline_of, summary
from metaopt.evaluate.course import Course, seed_streams
from metaopt.evaluate.statistics import Estimate, estimate
from metaopt.evaluate.tuning import POINTS_PER_ROUND, VALID_EXAMPLES, Tuning, tune_lr
from metaopt.learned import BoundRule, LearnedRule, digest
from metaopt.program.source import function_source
from metaopt.resolve import resolve_rule
from metaopt.rule import ElementwiseRule, UpdateRule
from metaopt.suite import content_hash, listed, suite_hash
from metaopt.task import Task, TaskFamily

CHECKPOINTS = 10
TEST_EXAMPLES = 16384


@dataclass(frozen=True)
class Entry:
    """One contender on one task.

    Attributes:
        contender, task: names.
        lr: what the final runs used; None if the contender declares none.
        tuning: how ``lr`` was found; None if it was not tuned.
        seeds: of the final runs.
        train: training loss of every step, [seeds][steps]; NaN from where a run diverged.
        checkpoints: numbers of steps after which ``valid`` was measured.
        valid: [seeds][checkpoints].
        test: loss on the test split, per seed; NaN for a diverged run.
        scores: the same, normalised by the task; finite.
        diverged: how many of the final runs did.
        loss: interquartile mean of ``test``, a diverged run counting as infinite.
    """

    contender: str
    task: str
    lr: float | None
    tuning: Tuning | None
    seeds: list[int]
    train: list[list[float]]
    checkpoints: list[int]
    valid: list[list[float]]
    test: list[float]
    scores: list[float]
    diverged: int
    loss: Estimate


@dataclass(frozen=True)
class RaceResult:
    """A finished race.

    Attributes:
        protocol: what was run: seeds, budgets, steps, sizes, back-end.
        contenders: name -> what it is: rule and all its values before tuning.
        tasks: names, in the order given.
        entries: ``entries[contender][task]``.
        aggregate: normalised score over tasks and seeds, per contender.
        seconds: wall-clock per contender; the one thing that differs between equal races.
        against_adamw: per contender ``score`` and ``speedup`` as in `metaopt.evaluate.baseline.summary`; empty unless
            the archive of baselines has every task of the race.
    """

    protocol: dict[str, Any]
    contenders: dict[str, dict[str, Any]]
    tasks: list[str]
    entries: dict[str, dict[str, Entry]]
    aggregate: dict[str, Estimate]
    seconds: dict[str, float] = field(default_factory=dict)
    against_adamw: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def ranking(self) -> list[str]:
        """Contenders from best to worst by aggregate; ties by number of diverged runs, then by name."""
        return sorted(self.contenders, key=lambda name: (self.aggregate[name].iqm, self.diverged(name), name))

    def diverged(self, contender: str) -> int:
        """Final runs of ``contender`` that diverged, over all tasks."""
        return sum(entry.diverged for entry in self.entries[contender].values())

    def best(self, task: str) -> str:
        """The contender with the lowest test loss on ``task``."""
        return min(self.ranking, key=lambda name: self.entries[name][task].loss.iqm)


def race(
    contenders: Mapping[str, UpdateRule | str] | Sequence[UpdateRule | str],
    tasks: Sequence[Task | TaskFamily | str] | str,
    *,
    seeds: int = 5,
    grid: int = 9,
    tune_seeds: int = 2,
    rounds: int = 2,
    steps: int | None = None,
    seed: int = 0,
    device: Any = "cpu",
    backend: str = "auto",
    progress: bool = True,
) -> RaceResult:
    """Tune every contender alike, run it from fresh seeds, score it on the test split; see the module for the protocol.

    Args:
        contenders: name -> rule (a learned optimizer bound to its theta), or a list of rules. Instead of a rule,
            whatever `metaopt.resolve.resolve_rule` takes: a registered name, a file, a meta-training run's directory.
        tasks: tasks, families, registered names, and ``suite:NAME`` for all tasks of a suite.
        seeds: final runs per contender and task.
        grid: learning rates over the declared search range, at least 3; 0: no tuning, each rule runs with its own.
        tune_seeds: training runs per learning rate.
        rounds: further tuning rounds of two learning rates each.
        steps: length of every training run; None: each task's horizon.
        seed: of the whole race.
        device: where to train.
        backend: of the unroll.
        progress: show a bar on stderr.

    Raises:
        ValueError: bad numbers, no or doubled contenders or tasks, unknown names.
        TypeError: something that is no rule, or no task.
    """
    _require(seeds=(seeds, 1), tune_seeds=(tune_seeds, 1), rounds=(rounds, 0), seed=(seed, 0))
    _require(steps=(1 if steps is None else steps, 1), grid=(grid, 0))
    if grid in (1, 2):
        raise ValueError(f"grid must be 0 (no tuning) or at least 3, so that the best point can be inside; got {grid}")
    rules = _resolve(contenders, device)
    sources = [_task(source, device) for source in _listed(tasks)]
    courses = [Course.of(source, steps, device, backend) for source in sources]
    names = [course.name for course in courses]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have different names, got {names}; rename one")

    stages = 1 + rounds + CHECKPOINTS
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    entries: dict[str, dict[str, Entry]] = {name: {} for name in rules}
    seconds = dict.fromkeys(rules, 0.0)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        line = bar.add_task("race", total=stages * len(rules) * len(courses))
        for course in courses:
            streams = seed_streams(seed, course.name, tune_seeds, seeds)
            for name, rule in rules.items():
                began = time.perf_counter()
                done = int(bar.tasks[0].completed)
                bar.update(line, description=f"{name} on {course.name}")
                tuning = tune_lr(course, rule, streams[0], grid, rounds, lambda: bar.advance(line))
                entries[name][course.name] = _final(course, name, rule, tuning, streams[1], lambda: bar.advance(line))
                bar.update(line, completed=done + stages)
                seconds[name] += time.perf_counter() - began

    curves = {
        name: baseline_of(name, source) if isinstance(source, Task) else None
        for name, source in zip(names, sources, strict=True)
    }
    contents = {
        name: content_hash(source) for name, source in zip(names, sources, strict=True) if isinstance(source, Task)
    }
    return RaceResult(
        protocol={
            "seed": seed, "seeds": seeds, "grid": grid, "rounds": rounds, "points_per_round": POINTS_PER_ROUND,
            "tune_seeds": tune_seeds, "tuning_runs": (grid + POINTS_PER_ROUND * rounds) * tune_seeds if grid else 0,
            "tuned": "lr, by normalised valid loss after the last step; diverged runs count as the worst loss",
            "scored": "test loss after the last step, from seeds disjoint from the tuning seeds",
            "steps": {course.name: course.steps for course in courses},
            "batch_size": {course.name: course.task.batch_size for course in courses},
            "valid_examples_at_most": VALID_EXAMPLES, "test_examples_at_most": TEST_EXAMPLES,
            "asked": [item if isinstance(item, str) else item.name for item in _given(tasks)],
            "suite_hash": suite_hash(contents),
            "device": str(device), "device_name": _device_name(device), "backend": backend,
        },
        contenders={name: description(rule) for name, rule in rules.items()},
        tasks=names,
        entries=entries,
        aggregate={name: estimate([row[task].scores for task in sorted(names)]) for name, row in entries.items()},
        seconds=seconds,
        against_adamw={
            name: summary(
                {task: curve for task, curve in curves.items() if curve is not None},
                {task: entry.test for task, entry in row.items()},
                {course.name: course.steps for course in courses},
            )
            for name, row in entries.items()
            if all(curves.values())
        },
    )  # fmt: skip


def _final(course: Course, name: str, rule: UpdateRule, tuning: Tuning | None, seeds: list[int], advance: Any) -> Entry:
    """The runs that count."""
    hp = {"lr": tuning.lr} if tuning else None
    marks = sorted({round(course.steps * i / CHECKPOINTS) for i in range(1, CHECKPOINTS + 1)} - {0})
    carry = course.start(rule, seeds)
    train, valid, at = [], [course.losses(carry, course.task.valid, VALID_EXAMPLES)], 0
    for mark in marks:
        losses, carry = course.train(rule, carry, mark - at, hp)
        train.append(losses.cpu())
        valid.append(course.losses(carry, course.task.valid, VALID_EXAMPLES))
        at = mark
        advance()
    test = course.losses(carry, course.task.test, TEST_EXAMPLES)
    own = rule.hp.get("lr")
    return Entry(
        contender=name,
        task=course.name,
        lr=tuning.lr if tuning else None if own is None else float(own),
        tuning=tuning,
        seeds=seeds,
        train=torch.cat(train, dim=1).tolist(),
        checkpoints=[0, *marks],
        valid=torch.stack(valid, dim=1).tolist(),
        test=test.tolist(),
        scores=course.scores(test, seeds).tolist(),
        diverged=int(test.isnan().sum()),
        loss=estimate([test.tolist()]),
    )


def _require(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _given(tasks: Any) -> list[Any]:
    return [tasks] if isinstance(tasks, (str, Task, TaskFamily)) else list(tasks or ())


def _listed(tasks: Any) -> list[Any]:
    """What was asked for, with suites replaced by their tasks."""
    expanded = [name for item in _given(tasks) for name in (listed([item]) if isinstance(item, str) else [item])]
    if not expanded:
        raise ValueError("a race needs at least one task, got none")
    return expanded


def _resolve(contenders: Any, device: Any) -> dict[str, UpdateRule]:
    """Name -> rule on the device, sorted by name so that order can make no difference."""
    if isinstance(contenders, (str, UpdateRule)):
        contenders = [contenders]
    if not contenders:
        raise ValueError("a race needs at least one contender, got none; for example race({'adamw': AdamW()}, [task])")
    if isinstance(contenders, Mapping):
        pairs = [(str(name), _rule(value)) for name, value in contenders.items()]
    else:
        pairs = [(_name(value), _rule(value)) for value in contenders]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders must have different names, got {names}; pass a mapping of names to rules")
    return {name: rule.to(device) if isinstance(rule, BoundRule) else rule for name, rule in sorted(pairs)}


def _name(value: Any) -> str:
    return value if isinstance(value, str) else type(value.learned if isinstance(value, BoundRule) else value).__name__


def _rule(value: Any) -> UpdateRule:
    if isinstance(value, str):
        value = resolve_rule(value)
    if isinstance(value, LearnedRule):
        raise TypeError(f"{type(value).__name__} is a learned optimizer without weights; race rule.bind(theta)")
    if not isinstance(value, UpdateRule):
        raise TypeError(f"a contender is an update rule or its name, got {value!r}; for example AdamW() or 'adamw'")
    if isinstance(value, BoundRule) and value.stacked:
        raise ValueError(f"{type(value.learned).__name__} is bound to one theta per copy; race one theta at a time")
    return value


def _task(value: Any, device: Any) -> Any:
    return registry.create("task", value, device=device) if isinstance(value, str) else value


def description(rule: UpdateRule) -> dict[str, Any]:
    """What a race says of a contender: equal descriptions, equal rules.

    Returns:
        ``rule``, its class; ``values`` of its hyperparameters and options; of a rule with meta-parameters their number
        (``meta_parameters``) and `digest` (``theta``); of an elementwise one the text of its ``program``.
    """
    inner = rule.learned if isinstance(rule, BoundRule) else rule
    described: dict[str, Any] = {"rule": type(inner).__name__, "values": rule.values()}
    if isinstance(rule, BoundRule):
        described["meta_parameters"] = sum(math.prod(value.shape) for value in rule.theta.values())
        described["theta"] = digest(rule.theta)
    if isinstance(rule, ElementwiseRule):
        described["program"] = function_source(rule.program, "update")
    return described


def _device_name(device: Any) -> str:
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
