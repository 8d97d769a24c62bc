"""From a target to its closed form as a file: fit each piece, choose the knee, round, join, verify what was written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.learned import LearnedRule
from metaopt.objective import Objective
from metaopt.resolve import resolve_rule
from metaopt.rule import ElementwiseRule, UpdateRule
from metaopt_symbolic.distill import objectives, optimizers, report
from metaopt_symbolic.distill.fit import Fit, Front, Target, rounded, search, shortened
from metaopt_symbolic.distill.pursuit import pursue
from metaopt_symbolic.distill.verify import FRESH, STEPS, Verdict, verify_objective, verify_optimizer
from metaopt_symbolic.genome import Genome
from metaopt_symbolic.objective_file import objective_source
from metaopt_symbolic.rule_file import rule_source
from metaopt_symbolic.search import Budget, Counts
from metaopt_symbolic.suites import search_tasks

NAME = "ClosedForm"
"""Of the class."""

ROUNDING = 0.1
"""Share of the tolerance that fewer digits may cost."""

FITTED = 3
"""On how many of the tasks an optimizer is fitted; it is verified on the others too."""


@dataclass(frozen=True)
class Distilled:
    """A closed form and what is known of it.

    Attributes:
        source: of a Python file with a class `NAME`.
        verdict: of verification.
        facts: ``report.json``.
        picture: a PNG of target and closed form.
    """

    source: str
    verdict: Verdict
    facts: str
    picture: bytes

    def save(self, directory: Path) -> list[Path]:
        """Write the file, the report and the picture; returns their paths."""
        return [
            write_atomic(directory / "closed_form.py", self.source),
            write_atomic(directory / "report.json", self.facts),
            write_atomic(directory / "closed_form.png", self.picture),
        ]


def resolve(target: str, seed: int, **settings: Any) -> Objective | UpdateRule:
    """What a user may distil.

    Args:
        target: a registered objective, a rule as `metaopt.resolve.resolve_rule` takes it, ``FILE.py:NAME`` or
            ``package.module:NAME`` of either, or a registered learned optimizer, which then has fresh meta-parameters.
        seed: of these.
        **settings: options of what is named.

    Raises:
        ValueError: neither.
    """
    learned = target in registry.specs("learned_optimizer")
    is_reference = ":" in target and not target.startswith("zoo:")
    if learned or is_reference or target in registry.specs("objective"):
        made: Any = registry.create("learned_optimizer" if learned else "objective", target, **settings)
    else:
        made = resolve_rule(target, **settings)
    if isinstance(made, LearnedRule):
        made = made.bind(made.init_theta(torch.Generator().manual_seed(seed)))
    if not isinstance(made, (Objective, UpdateRule)):
        raise ValueError(f"{target} gives a {type(made).__name__}; give an objective or an optimizer")
    return made


def distil(
    target: Objective | UpdateRule,
    name: str,
    budget: Budget,
    *,
    tolerance: float,
    tasks: str,
    seed: int,
    directory: Path,
    console: Console,
) -> Distilled:
    """Fit, choose, write and verify; one that was stopped goes on.

    Args:
        target: an objective, or an optimizer.
        name: what users call it.
        budget: of the search for each piece.
        tolerance: mean error that counts as none.
        tasks: on which an optimizer is watched, see `metaopt_symbolic.suites.search_tasks`.
        seed: of everything random.
        directory: where checkpoints are until the end, see `checkpoints`.
        console: where progress is told.

    Raises:
        ValueError: a target that has no closed form of the kind that is searched for, or a checkpoint of another one.
        KeyboardInterrupt: Ctrl-C.
    """
    if isinstance(target, Objective):
        return _objective(target, name, budget, tolerance, seed, directory, console)
    return _optimizer(target, name, budget, tolerance, tasks, seed, directory, console)


def checkpoints(directory: Path) -> list[Path]:
    """Files that a distillation which was stopped has left."""
    return sorted(directory.glob("piece-*.npz"))


def _objective(
    target: Objective, name: str, budget: Budget, tolerance: float, seed: int, directory: Path, console: Console
) -> Distilled:
    starts = objectives.starts(target)
    targets = {piece.name: objectives.ObjectiveTarget(target, piece, seed=seed) for piece in objectives.pieces(target)}
    fronts, chosen = _fitted(targets, starts, budget, tolerance, seed, directory, console)
    genome = objectives.assembled(target, [fit.genome for fit in chosen.values()])
    source = objective_source(genome, target.kind, NAME, f"What {name} does, found by metaopt distill.")
    closed = _imported("objective", source)
    verdict = verify_objective(target, closed, tolerance=tolerance, seed=seed)
    return _distilled(
        name, source, fronts, chosen, verdict, report.objective_picture(target, closed), console,
        {"tolerance": tolerance, "seed": seed, "ranges": objectives.RANGES},
    )  # fmt: skip


def _optimizer(
    target: UpdateRule,
    name: str,
    budget: Budget,
    tolerance: float,
    tasks: str,
    seed: int,
    directory: Path,
    console: Console,
) -> Distilled:
    every = search_tasks(tasks)
    fitted, others = ({key: every[key] for key in keys} for keys in ([*every][:FITTED], [*every][FITTED:]))
    recorded = optimizers.record(target, fitted, steps=STEPS, seed=seed)
    targets = {"updates": optimizers.OptimizerTarget(recorded)}
    fronts, chosen = _fitted(targets, optimizers.starts(), budget, tolerance, seed, directory, console)
    genome = optimizers.with_rate(chosen["updates"].genome)
    source = rule_source(genome, NAME, f"What {name} does, found by metaopt distill.")
    closed = _imported("optimizer", source)
    assert isinstance(closed, ElementwiseRule)
    verdict = verify_optimizer(target, closed, fitted, others, tolerance=tolerance, seed=seed)
    fresh = optimizers.record(target, fitted, steps=STEPS, seed=seed + FRESH)
    picture = report.scatter("update", fresh.updates, optimizers.updates_of(closed, fresh))
    return _distilled(
        name, source, fronts, chosen, verdict, picture, console,
        {"tolerance": tolerance, "seed": seed, "fitted on": [*fitted], "verified on": [*every], "steps": STEPS},
    )  # fmt: skip


def _fitted(
    targets: Mapping[str, Target],
    starts: Sequence[Genome],
    budget: Budget,
    tolerance: float,
    seed: int,
    directory: Path,
    console: Console,
) -> tuple[dict[str, Front], dict[str, Fit]]:
    """The front of each piece, and the rounded knee of each."""
    fronts, chosen = {}, {}
    for number, (name, target) in enumerate(targets.items()):

        def told(front: Front, counts: Counts, name: str = name) -> None:
            if counts.generations % 20 == 0:
                console.print(report.line(name, front, counts), highlight=False, soft_wrap=True)

        file = directory / f"piece-{number}.npz"
        front = search(target, starts, budget, functions="losses", seed=seed, file=file, on_generation=told)
        if starts[0].is_loss and front.best.error > tolerance:
            console.print(
                f"{name}: error {front.best.error:.2e} by evolution, now sums of small formulas", highlight=False
            )
            pursue(target, starts, front, tolerance=tolerance)
        shortened(target, front)
        fronts[name], chosen[name] = front, rounded(target, front.knee, ROUNDING * tolerance)
        console.print(report.front_table(name, front, front.knee))
    return fronts, chosen


def _imported(kind: str, source: str) -> Any:
    """What a user gets who names the file."""
    with tempfile.TemporaryDirectory() as directory:
        return registry.create(kind, f"{write_atomic(Path(directory) / 'closed_form.py', source)}:{NAME}")


def _distilled(
    name: str, source: str, fronts: Mapping[str, Front], chosen: Mapping[str, Fit], verdict: Verdict, picture: bytes,
    console: Console, settings: Mapping[str, Any],
) -> Distilled:  # fmt: skip
    console.print(report.verdict_table(verdict))
    console.print(source[source.index("class ") :], highlight=False, markup=False, soft_wrap=True)
    return Distilled(source, verdict, report.facts({"target": name, **settings}, fronts, chosen, verdict), picture)
