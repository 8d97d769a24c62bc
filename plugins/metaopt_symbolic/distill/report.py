"""What a distillation found: a table, a picture, and JSON with all of it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from metaopt.objective import Objective
from metaopt_symbolic.distill import objectives
from metaopt_symbolic.distill.fit import Fit, Front
from metaopt_symbolic.distill.verify import Verdict

ADVANTAGES = (-2.0, -1.0, 1.0, 2.0)
"""Of the curves of drifts."""


def front_table(name: str, front: Front, chosen: Fit) -> Table:
    """Lengths and errors of a piece; ``chosen`` is the knee."""
    table = Table(title=f"closed forms, {name}")
    for column in ("statements", "error", ""):
        table.add_column(column, justify="right")
    for fit in front.fits:
        table.add_row(str(fit.length), f"{fit.error:.2e}", "knee" if fit is chosen else "")
    return table


def verdict_table(verdict: Verdict) -> Table:
    """How far the closed form is from its target."""
    table = Table(title="differences from the target")
    for column in ("", "mean", "99 % below", "largest", "R^2"):
        table.add_column(column, justify="right")
    for a in verdict.agreements:
        table.add_row(a.where, f"{a.mean:.2e}", f"{a.most:.2e}", f"{a.largest:.2e}", f"{a.r2:.6f}")
    return table


def facts(settings: Mapping[str, Any], fronts: Mapping[str, Front], chosen: Mapping[str, Fit], verdict: Verdict) -> str:
    """``report.json``."""
    found = {
        **settings,
        "pieces": {
            name: {
                "front": [_told(fit) for fit in front.fits],
                "knee": {"statements": front.knee.length, "error": front.knee.error},
                "chosen": _told(chosen[name]),
            }
            for name, front in fronts.items()
        },
        "agreement": [dataclasses.asdict(a) for a in verdict.agreements],
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in verdict.checks],
        "verified": verdict.verified,
        "verdict": verdict.text,
    }
    return json.dumps(found, indent=1) + "\n"


def _told(fit: Fit) -> dict[str, Any]:
    """A fit for readers, and its genome for `metaopt_symbolic.genome.from_json`: a text does not say what is a tensor."""
    return {
        "statements": fit.length, "error": fit.error, "program": fit.genome.text(), "genome": fit.genome.to_json()
    }  # fmt: skip


def objective_picture(target: Objective, closed: Objective) -> bytes:
    """Slopes of both and their difference: curves where slopes are of one number, or of a ratio at some advantages, else
    against each other."""
    if target.kind == "rl":
        width = objectives.RANGES["log_ratio"]
        ratio = torch.exp(torch.linspace(-width, width, 401, dtype=torch.float64))
        curves = {f"A = {a:g}": {"ratio": ratio, "advantage": torch.full_like(ratio, a)} for a in ADVANTAGES}
        return _curves("ratio", "slope of the drift", target, closed, curves)
    if len(target.inputs) == 1:
        (name,) = target.inputs
        x = torch.linspace(-1, 1, 601, dtype=torch.float64) * objectives.RANGES[name]
        return _curves(name, f"slope of the loss by {name}", target, closed, {"": {name: x}})
    points = objectives.sample(target, 1000, 0)
    return scatter("slope", objectives.slopes(target, points), objectives.slopes(closed, points))


def _curves(
    across: str, what: str, target: Objective, closed: Objective, curves: Mapping[str, Mapping[str, Tensor]]
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    both, missing = figure.subplots(1, 2)
    for k, (label, inputs) in enumerate(curves.items()):
        x, wanted, found = inputs[across], *(objectives.slopes(o, inputs)[0] for o in (target, closed))
        both.plot(x, wanted, color=f"C{k}", linewidth=3, alpha=0.4, label=f"target {label}")
        both.plot(x, found, color=f"C{k}", linewidth=1, label=f"closed form {label}")
        missing.plot(x, found - wanted, color=f"C{k}", label=label)
    both.set(xlabel=across, ylabel=what)
    missing.set(xlabel=across, ylabel="closed form less target")
    both.legend(fontsize="x-small")
    return _png(figure)


def scatter(what: str, wanted: Tensor, found: Tensor) -> bytes:
    """Outputs of both against each other, and their difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    both, missing = figure.subplots(1, 2)
    x, y = wanted.flatten()[:5000], found.flatten()[:5000]
    both.axline((0, 0), slope=1, color="gray", linewidth=0.5)
    both.plot(x, y, ".", markersize=2)
    missing.plot(x, y - x, ".", markersize=2)
    both.set(xlabel=f"{what} of the target", ylabel=f"{what} of the closed form")
    missing.set(xlabel=f"{what} of the target", ylabel="closed form less target")
    return _png(figure)


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120, metadata={"Software": None})
    return target.getvalue()


def line(name: str, front: Front, counts: Any) -> str:
    """The search at this moment."""
    return (
        f"{name}: {counts.children:,} children, {counts.unique:,} structures fitted, error {front.best.error:.2e} "
        f"({front.best.length} statements with weights), {counts.seconds:.0f} s"
    )
