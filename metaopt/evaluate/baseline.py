"""Tuned AdamW's curve on every task: the yardstick that makes losses of different tasks comparable.

For each task AdamW's learning rate is tuned as in a race (for the task's horizon), then fresh seeds train for twice the
horizon. The archive keeps the mean judged loss on the test split after some numbers of steps. Against it a loss reads as

- `Curve.steps_for`: how many steps tuned AdamW needs for the same loss: the measure of Metz et al. 2022 (VeLO,
  arXiv:2211.09760, section 4), in [0, 2 horizon];
- `Curve.score`: 0 = untrained, 1 = tuned AdamW at the horizon; in [-1, 2].

Both are finite for any input. The archive is JSON lines, one task a line, sorted; a run goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metaopt import registry
from metaopt.evaluate.course import Course, seed_streams
from metaopt.evaluate.tuning import tune_lr
from metaopt.files import write_atomic
from metaopt.rule import UpdateRule
from metaopt.suite import content_hash
from metaopt.task import Task

GRID, ROUNDS, TUNE_SEEDS, SEEDS, MARKS = 7, 1, 2, 3, 24
EXAMPLES = 2048
LONGER = 2
"""The curve reaches this many horizons."""


@dataclass(frozen=True)
class Curve:
    """The baseline on one task.

    Attributes:
        task: its name.
        content: its `metaopt.suite.content_hash`.
        rule: what was tuned.
        lr: the tuned learning rate.
        edge: whether that is an end of what was tried.
        horizon: steps for which it was tuned.
        steps: numbers of steps, increasing from 0 to ``2 * horizon``.
        losses: mean test loss of the seeds after so many steps; None where it was not finite.
    """

    task: str
    content: str
    rule: str
    lr: float
    edge: bool
    horizon: int
    steps: tuple[int, ...]
    losses: tuple[float | None, ...]

    def steps_for(self, loss: float) -> float:
        """Steps that the baseline needs to reach ``loss``, interpolated on its curve, made monotone.

        Returns:
            0 for a loss no better than the untrained one (or NaN), ``2 * horizon`` for one that it never reaches.
        """
        curve = self._falling()
        if math.isnan(loss) or loss >= curve[0]:
            return 0.0
        if loss < curve[-1]:
            return float(self.steps[-1])
        i = int(np.argmax(curve <= loss))  # the first point that is as good; the one before it is worse
        share = (curve[i - 1] - loss) / (curve[i - 1] - curve[i])
        return float(self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1]))

    def score(self, loss: float) -> float:
        """(untrained - loss) / (untrained - tuned baseline at its horizon), in [-1, 2]; NaN counts as -1."""
        curve = self._falling()
        tuned = float(np.interp(self.horizon, self.steps, curve))
        gain = curve[0] - tuned
        if math.isnan(loss) or not gain > 0:
            return -1.0 if math.isnan(loss) or loss > curve[0] else 1.0
        return float(np.clip((curve[0] - loss) / gain, -1.0, 2.0))

    def _falling(self) -> np.ndarray:
        """The non-increasing curve nearest to the losses (a running minimum would be biased by their noise).

        A loss that is not finite counts as the untrained one, and so does one above that.
        """
        from scipy.optimize import isotonic_regression  # slow to import, and much that imports this never scores

        losses = np.array([math.nan if value is None else value for value in self.losses], dtype=float)
        finite = losses[np.isfinite(losses)]
        start = losses[0] if np.isfinite(losses[0]) else np.max(finite, initial=0.0)
        return isotonic_regression(np.minimum(np.where(np.isfinite(losses), losses, np.inf), start), increasing=False).x


def measure(task: Task, name: str, rule: UpdateRule, rule_name: str, device: Any = "cpu", seed: int = 0) -> Curve:
    """Tune ``rule`` on ``task`` and record its curve."""
    course = Course.of(task, None, device, "auto")
    tuning_seeds, seeds = seed_streams(seed, name, TUNE_SEEDS, SEEDS)
    tuning = tune_lr(course, rule, tuning_seeds, GRID, ROUNDS)
    if tuning is None:
        raise ValueError(f"{rule_name} declares no learning rate to tune; choose another rule for the baseline")
    marks = _marks(task.horizon)
    carry = course.start(rule, seeds)
    losses, at = [], 0
    for mark in marks:
        if mark:
            _, carry = course.train(rule, carry, mark - at, {"lr": tuning.lr})
        at = mark
        losses.append(float(course.losses(carry, course.task.test, EXAMPLES).mean()))
    return Curve(
        name, content_hash(task), rule_name, tuning.lr, tuning.edge, task.horizon, tuple(marks),
        tuple(float(f"{loss:.6g}") if math.isfinite(loss) else None for loss in losses),
    )  # fmt: skip


def build(names: Sequence[str], path: Path, *, rule: str = "adamw", device: Any = "cpu", progress: bool = True) -> None:
    """Measure the tasks ``names`` that the archive at ``path`` lacks, or holds with other content; keep the others."""
    for name in names:
        registry.get("task", name)  # an unknown one is an error now and not after hours
    archive = dict(read(path)) if path.is_file() else {}
    others = {curve.rule for curve in archive.values()} - {rule}
    if others:
        raise ValueError(f"{path} holds curves of {min(others)}, not of {rule}; give each rule an archive of its own")
    optimizer = registry.create("optimizer", rule)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        line = bar.add_task("baseline", total=len(names))
        for name in names:
            bar.update(line, description=name)
            task = registry.create("task", name, device=device)
            known = archive.get(name)
            if known is None or known.content != content_hash(task):
                archive[name] = measure(task, name, optimizer, rule, device)
                write(archive, path)
            bar.advance(line)


def write(archive: Mapping[str, Curve], path: Path) -> None:
    """The archive as JSON lines."""
    lines = [json.dumps(dataclasses.asdict(archive[name]), allow_nan=False) for name in sorted(archive)]
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def read(path: Path) -> dict[str, Curve]:
    """The archive at ``path``, by task."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["task"]: Curve(**row | {key: tuple(row[key]) for key in ("steps", "losses")}) for row in rows}


def baseline_of(name: str, task: Task | None = None) -> Curve | None:
    """The archived curve of a registered task, if there is one (and, where ``task`` is given, one of that content)."""
    spec = registry.specs("task").get(name)
    path = spec.facts.get("baseline") if spec else None
    curve = _read_once(Path(path)).get(name) if path else None
    return curve if curve is None or task is None or curve.content == content_hash(task) else None


_read_once = cache(read)


def _marks(horizon: int) -> list[int]:
    """0, then about geometric steps to twice the horizon, with the horizon among them."""
    spread = np.geomspace(1, LONGER * horizon, MARKS - 2)
    return sorted({0, horizon, *(round(float(step)) for step in spread)})


def summary(
    curves: Mapping[str, Curve], losses: Mapping[str, Sequence[float]], steps: Mapping[str, int]
) -> dict[str, float]:
    """Means over tasks and seeds of what was reached after ``steps[task]`` steps with test losses ``losses[task]``.

    Returns:
        ``score`` (`Curve.score`), and ``speedup``: steps that tuned AdamW needs over the steps that were made.
    """
    found = [(curves[task], loss, steps[task]) for task, values in losses.items() for loss in values]
    return {
        "score": float(np.mean([curve.score(loss) for curve, loss, _ in found])),
        "speedup": float(np.mean([curve.steps_for(loss) / made for curve, loss, made in found])),
    }
