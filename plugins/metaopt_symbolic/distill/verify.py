"""Whether a closed form does what its target does, where the fit has not looked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaopt.objective import Objective, faults
from metaopt.rule import ElementwiseRule, UpdateRule
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_symbolic.distill import objectives, optimizers
from metaopt_symbolic.losses.judge import Regime, margin_of, train

LOOSE = 5.0
"""How many times the tolerance of the mean error the error of 99 % of the points may be, and that on other tasks."""

FRESH, WIDER = 4096, 2.0
"""Points that are compared, and how much larger inputs are outside the fitted range."""

STEPS, LONGER = 40, 3
"""Steps of recorded runs, and how many times as long those are that say whether a rule holds beyond them."""

SEEDS = 6
"""Of the runs of training with both."""


@dataclass(frozen=True)
class Check:
    """A number and what it may be at most.

    Attributes:
        what: was measured.
        value: 0 is best; NaN passes no check.
        limit: up to which it passes.
    """

    what: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is within its limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Agreement:
    """How far outputs are from those of the target.

    Attributes:
        where: they were compared.
        mean: mean difference, in units of the mean size of the target's.
        most: what 99 % of the differences are below, in units of the target's largest.
        largest: difference, in the same units.
        r2: share of the target's squares that is explained.
    """

    where: str
    mean: float
    most: float
    largest: float
    r2: float

    @classmethod
    def of(cls, where: str, found: Tensor, wanted: Tensor) -> Agreement:
        """Of outputs and the target's, of one shape."""
        missing, size = (found - wanted).abs().flatten().numpy(), wanted.abs().flatten().numpy()
        if not np.isfinite(missing).all():
            return cls(where, math.inf, math.inf, math.inf, -math.inf)
        return cls(
            where,
            float(missing.mean() / size.mean()),
            float(np.quantile(missing, 0.99) / size.max()),
            float(missing.max() / size.max()),
            float(1 - (missing**2).sum() / (size**2).sum()),
        )


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Attributes:
        agreements: inside the fitted range and beyond.
        checks: all of them must pass.
    """

    agreements: tuple[Agreement, ...]
    checks: tuple[Check, ...]

    @property
    def verified(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    @property
    def text(self) -> str:
        """The verdict as a line."""
        failed = [f"{c.what} is {c.value:.3g}, above {c.limit:.3g}" for c in self.checks if not c.passed]
        return f"not verified: {'; '.join(failed)}" if failed else "verified: " + "; ".join(
            f"{c.what} {c.value:.3g}" for c in self.checks
        )  # fmt: skip


def verify_objective(target: Objective, closed: Objective, *, tolerance: float, seed: int) -> Verdict:
    """Compare slopes at points that no fit has seen, look for overflows, and train policies with both where losses are of
    preferences.

    Args:
        target: what was fitted.
        closed: the closed form, as users have it.
        tolerance: mean error that is no error, in units of the mean slope.
        seed: of the fit; verification draws other points.
    """
    agreements = []
    for where, spread in (("inside", 1.0), ("beyond", WIDER)):
        points = objectives.sample(target, FRESH, seed + FRESH, spread)
        found, wanted = objectives.slopes(closed, points), objectives.slopes(target, points)
        agreements.append(Agreement.of(where, found, wanted))
    # a network says nothing where it was not trained: what is beyond is told, and no reason to fail
    checks = _checks(agreements[0], (), tolerance)
    checks.append(Check("number of faults of metaopt.objective.faults", float(len(faults(closed))), 0.0))
    if target.kind == "rl":
        a = torch.linspace(-1, 1, 101, dtype=torch.float64) * objectives.RANGES["advantage"]
        at_one = objectives.slopes(closed, {"ratio": torch.ones_like(a), "advantage": a})
        checks.append(Check("slope of the drift at ratio 1", float(at_one.abs().max()), tolerance))
    if target.kind == "preference":
        checks.append(_trained(target, closed))
    return Verdict(tuple(agreements), tuple(checks))


def _checks(inside: Agreement, beyond: Sequence[Agreement], tolerance: float) -> list[Check]:
    return [
        Check(f"mean error {inside.where}", inside.mean, tolerance),
        Check(f"error of 99 % of the points {inside.where}", inside.most, LOOSE * tolerance),
        *(Check(f"mean error {other.where}", other.mean, LOOSE * tolerance) for other in beyond),
    ]


def _trained(target: Objective, closed: Objective) -> Check:
    task = Regime("distilled", {"data": "preferences_noisy", "seed": 40}).task()
    seeds = range(200, 200 + SEEDS)
    losses = train(task, [target, closed], horizon=120, seeds=seeds, scales=(1.0,), rates=(0.1,)).flatten(1).numpy()
    return _same("reward lost by training with it, less that with the target", losses)


def _same(what: str, losses: NDArray[np.float64]) -> Check:
    """Whether the means of two rows of losses [2, seeds], the target's first, differ by less than the first one's noise."""
    return Check(what, abs(float(losses[1].mean() - losses[0].mean())), margin_of(losses[0]))


def verify_optimizer(
    target: UpdateRule,
    closed: ElementwiseRule,
    fitted: Mapping[str, Task],
    others: Mapping[str, Task],
    *,
    tolerance: float,
    seed: int,
) -> Verdict:
    """Compare updates along runs that no fit has seen: of another seed, of other tasks, and longer ones; and train with both.

    Args:
        target: what was fitted.
        closed: the closed form, as users have it.
        fitted: tasks of the fit.
        others: tasks that it has not seen; there may be none.
        tolerance: mean error that is no error, in units of the mean update.
        seed: of the fit.
    """
    runs = {
        "inside": (fitted, STEPS),
        **({"on other tasks": (others, STEPS)} if others else {}),
        f"in runs {LONGER} times as long": (fitted, LONGER * STEPS),
    }
    agreements = []
    for where, (tasks, steps) in runs.items():
        recorded = optimizers.record(target, tasks, steps=steps, seed=seed + FRESH)
        agreements.append(Agreement.of(where, optimizers.updates_of(closed, recorded), recorded.updates))
    checks = _checks(agreements[0], agreements[1:], tolerance)
    for name, task in {**fitted, **others}.items():
        seeds = [*range(200, 200 + SEEDS)]
        with torch.no_grad():
            runs_of = [
                unroll(task, rule, start(task, rule, seeds), STEPS, horizon=STEPS)[0] for rule in (target, closed)
            ]
        ends = torch.stack([task.normalize(losses[:, -STEPS // 6 :]).mean(1) for losses in runs_of])
        checks.append(_same(f"final loss on {name}, less the target's", ends.double().numpy()))
    return Verdict(tuple(agreements), tuple(checks))
