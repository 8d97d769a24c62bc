"""Trials that train together: every trial is a few copies (one per seed) of one unroll, whatever point each has reached."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from metaopt import tree
from metaopt.evaluate.course import Course
from metaopt.evaluate.tuning import VALID_EXAMPLES
from metaopt.rule import UpdateRule
from metaopt.space import Hyper
from metaopt.unroll import Carry

LOOK_EXAMPLES = 512
"""Of the valid split, for a point of a learning curve; the value of a trial takes `VALID_EXAMPLES`."""


@dataclass
class Run:
    """One trial's training runs, one per seed.

    Attributes:
        key: whose they are; the caller's.
        values: of the rule: what the trial sets.
        units: budget units done.
        losses, scores: valid loss after the last unit, per seed, and the same normalised; empty before one. The loss of a
            training run that diverged is NaN.
        seconds: of process time, its share of what the copies that ran together took.
        memory: bytes of parameters and state of one copy.
    """

    key: Any
    values: Mapping[str, Any]
    units: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.scores) / len(self.scores)

    @property
    def diverged(self) -> int:
        """How many of its training runs did."""
        return sum(map(math.isnan, self.losses))


@dataclass
class _Lane:
    """Runs whose rules differ in numbers alone, so that they are copies of one unroll."""

    rule: UpdateRule
    runs: list[Run] = field(default_factory=list)
    carry: Carry | None = None


class Lockstep:
    """Runs that advance unit by unit; finished ones leave, new ones take their places.

    Args:
        course: what to train on, and for how many steps.
        rule: its hyperparameters and options hold where a run sets no other values.
        seeds: of every run: all of them see the same initial parameters and batches.
        units: budget units of a whole run, all of one length.

    Raises:
        ValueError: ``units`` that do not divide the steps of a run.
    """

    def __init__(self, course: Course, rule: UpdateRule, seeds: Sequence[int], units: int) -> None:
        self.course, self.rule, self.seeds, self.units = course, rule, list(seeds), units
        self._lanes: dict[Any, _Lane] = {}
        if units < 1 or course.steps % units:
            raise ValueError(
                f"units must divide the {course.steps} steps of a run, got {units}; try {usual_units(course.steps)}"
            )

    @property
    def runs(self) -> list[Run]:
        """All that are under way."""
        return [run for lane in self._lanes.values() for run in lane.runs]

    def admit(self, runs: Sequence[Run]) -> None:
        """Start these, from the next `advance` on."""
        declared = self.rule.declared()
        for run in runs:
            options = {name: value for name, value in run.values.items() if not isinstance(declared[name], Hyper)}
            rule = self.rule.replaced(**options)
            lane = self._lanes.setdefault(rule.structure(), _Lane(rule))
            carry = self.course.start(rule, self.seeds)
            run.memory = sum(leaf[0].nbytes for leaf in tree.leaves({"params": carry.params, "state": carry.state}))
            lane.carry = carry if lane.carry is None else joined([lane.carry, carry])
            lane.runs.append(run)

    def advance(self) -> list[Run]:
        """Train every run for one unit and look at it; runs that are finished or diverged say so.

        Returns:
            all runs, in the order in which they were admitted lane by lane.
        """
        for lane in self._lanes.values():
            if lane.runs:
                self._advance(lane)
        return self.runs

    def drop(self, runs: Sequence[Run]) -> None:
        """Forget these runs."""
        gone = {id(run) for run in runs}
        for lane in self._lanes.values():
            stay = [i for i, run in enumerate(lane.runs) if id(run) not in gone]
            if len(stay) == len(lane.runs):
                continue
            lane.runs = [lane.runs[i] for i in stay]
            lane.carry = taken(lane.carry, stay, len(self.seeds)) if stay and lane.carry is not None else None

    def _advance(self, lane: _Lane) -> None:
        assert lane.carry is not None
        began = time.process_time()
        hp = stacked_values(lane.rule, [run.values for run in lane.runs], len(self.seeds))
        _, lane.carry = self.course.train(lane.rule, lane.carry, self.course.steps // self.units, hp)
        for run in lane.runs:
            run.units += 1
        for examples, at_end in ((LOOK_EXAMPLES, False), (VALID_EXAMPLES, True)):
            at = [i for i, run in enumerate(lane.runs) if (run.units == self.units) == at_end]
            if at:
                losses = self.course.losses(
                    taken(lane.carry, at, len(self.seeds)), self.course.task.valid, examples
                ).reshape(len(at), -1)
                scores = self.course.scores(losses.flatten(), self.seeds * len(at)).reshape(len(at), -1)
                for i, raw, normalised in zip(at, losses.tolist(), scores.tolist(), strict=True):
                    lane.runs[i].losses, lane.runs[i].scores = raw, normalised
        share = (time.process_time() - began) / len(lane.runs)
        for run in lane.runs:
            run.seconds += share


def usual_units(steps: int, most: int = 10) -> int:
    """Into how many units of equal length a run of ``steps`` is divided if nobody says: at most ``most``."""
    return max(units for units in range(1, most + 1) if steps % units == 0)


def stacked_values(rule: UpdateRule, settings: Sequence[Mapping[str, Any]], each: int) -> dict[str, Any]:
    """The hyperparameters among ``settings`` as one number per copy, float64 [len(settings) * each] on the CPU.

    What one setting lacks has the rule's own value there.
    """
    declared = rule.declared()
    names = dict.fromkeys(name for values in settings for name in values if isinstance(declared[name], Hyper))

    def per_copy(column: Sequence[float]) -> torch.Tensor:
        return torch.tensor(column, dtype=torch.float64).repeat_interleave(each)

    found: dict[str, Any] = {}
    for name in names:
        column = [values.get(name, rule.hp[name]) for values in settings]
        if isinstance(column[0], tuple):
            found[name] = tuple(per_copy(entries) for entries in zip(*column, strict=True))
        else:
            found[name] = per_copy(column)
    return found


def joined(carries: Sequence[Carry]) -> Carry:
    """The copies of several carries in one, in this order."""
    return Carry.from_tree(tree.map_tree(lambda *leaves: torch.cat(leaves), *(carry.tree() for carry in carries)))


def taken(carry: Carry, groups: Sequence[int], each: int) -> Carry:
    """The copies of these groups of ``each`` neighbours, in this order."""
    at = torch.tensor(groups, device=carry.seeds.device)[:, None] * each + torch.arange(each, device=carry.seeds.device)
    return Carry.from_tree(tree.index(carry.tree(), at.flatten()))
