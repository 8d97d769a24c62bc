"""Found losses against published ones, where nothing was tuned or selected.

Published losses are tuned on the tasks on which the winner of a search is selected, with more settings than the winner and its
rivals had there together. Then all are trained with on tasks of their own, whose data, initial parameters and batches are
those of the seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from metaopt import registry
from metaopt.files import write_atomic
from metaopt_symbolic.genome import Assign, Genome, from_objective, parse
from metaopt_symbolic.losses import judge
from metaopt_symbolic.losses.candidate import BETA, INPUTS, LossValidator, objective, python
from metaopt_symbolic.losses.judge import MEASURES, RATES, SCALES, Regime, Stage, margin_of, measured, train
from metaopt_symbolic.losses.mutator import tidy
from metaopt_symbolic.losses.report import sampled
from metaopt_symbolic.losses.selection import ELITES
from metaopt_symbolic.proposals.report import lineage, png
from metaopt_symbolic.simplify import folded

FILE, PICTURE, CURVES = "comparison.json", "comparison.png", "curves.png"
REPORT = "report.json"

TUNED_SCALES = tuple(2.0 ** (k / 2) for k in range(-14, 9))
"""Of log-probabilities, for losses with a beta of 0.05: betas from 0.0004 to 0.8."""

TUNED_RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Learning rates of Adam, at the first step."""

PUBLISHED: Mapping[str, Sequence[Mapping[str, float]]] = {
    "dpo": ({},),
    "ipo": ({},),
    "slic": ({},),
    "lrml": tuple({"tau": tau} for tau in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)),
}
"""Registered objectives, and the values of their own numbers that are tried with every scale and learning rate."""

CDPO = """\
def loss(rho):
    z = mul(rho, 0.05)
    right = logsigmoid(z)
    w = negative(z)
    wrong = logsigmoid(w)
    expected = interpolate(right, wrong, {share})
    loss = negative(expected)
    return loss
"""
"""DPO that expects a share of the pairs to be ranked the wrong way round (Mitchell, 2023, "conservative DPO")."""
SHARES = (0.1, 0.2, 0.3, 0.4)

SHOWN = 100.0
"""Largest |rho| of the picture, about that of the trained policies."""


@dataclass(frozen=True)
class Contestant:
    """A loss and its setting.

    Attributes:
        genome: at a scale of 1.
        scale, rate: of the log-probabilities, and of Adam.
        numbers: of the loss's own, as they were tuned.
        selection: its loss on the tasks of the selection.
        tried: settings that were tried there.
        edge: whether a scale or rate further out might be better.
        history: of a found one: where it is from, a line each.
    """

    genome: Genome
    scale: float
    rate: float
    numbers: Mapping[str, float]
    selection: float
    tried: int
    edge: bool = False
    history: Sequence[str] = ()


def with_beta(genome: Genome) -> Genome:
    """The same loss as a function of rho and beta: a scale of the log-probabilities is that times a beta of `BETA`."""
    seen = [Assign("z", "mul", (*INPUTS, "beta")), Assign("r", "mul", ("z", 1 / BETA))]
    return _behind(seen, genome, ("beta",))


def scaled(genome: Genome, scale: float) -> Genome:
    """The loss of ``scale`` rho."""
    return _behind([Assign("r", "mul", (*INPUTS, scale))], genome)


def _behind(seen: Sequence[Assign], genome: Genome, scalars: tuple[str, ...] = ()) -> Genome:
    """A loss that sees r, which ``seen`` assigns, in the place of rho."""
    genome = tidy(folded(genome))  # whose variables are x1, x2, ...
    body = [a._replace(args=tuple("r" if arg in INPUTS else arg for arg in a.args)) for a in genome.body]
    return replace(genome, scalars=scalars, body=(*seen, *body))


def published(stage: Stage) -> dict[str, Contestant]:
    """DPO, IPO, SLiC, LRML and cDPO, each at the setting that is best on the tasks of ``stage``."""
    tasks = [regime.task() for regime in stage.regimes]
    settings = [*itertools.product(TUNED_SCALES, TUNED_RATES)]
    forms = {
        name: [(dict(own), from_objective(registry.create("objective", name, beta=BETA, **own))) for own in numbers]
        for name, numbers in PUBLISHED.items()
    } | {"cdpo": [({"share": share}, parse(CDPO.format(share=share))) for share in SHARES]}
    found = {}
    for name, tried in forms.items():
        means = []
        for _, genome in tried:
            losses = [
                train(task, [objective(genome)], horizon=stage.horizon, seeds=stage.seeds, scales=TUNED_SCALES,
                      rates=TUNED_RATES)
                for task in tasks
            ]  # fmt: skip
            means.append(torch.stack(losses).mean((0, 1, 4)).flatten())
        best = torch.stack(means)
        form, setting = divmod(int(best.argmin()), len(settings))
        scale, rate = settings[setting]
        is_edge = scale in (TUNED_SCALES[0], TUNED_SCALES[-1]) or rate in (TUNED_RATES[0], TUNED_RATES[-1])
        numbers, genome = tried[form]
        found[name] = Contestant(genome, scale, rate, numbers, float(best.min()), best.numel(), is_edge)
    return found


def winner(run: Path) -> Contestant:
    """The loss that ``metaopt discover loss`` selected, at the setting that was best for it there.

    Raises:
        ValueError: the search is not there, or has not ended.
    """
    candidates = LossValidator().load(run)
    if not (run / REPORT).is_file():
        raise ValueError(f"{run} holds a search that has not ended; metaopt discover loss --out {run} goes on")
    told = json.loads((run / REPORT).read_text())["winner"]
    (chosen,) = (c for c in candidates if c.digest == told["digest"])
    selection = told["selection"][str(chosen.number)]
    tried = ELITES * len(SCALES) * len(RATES)
    history = lineage(chosen, candidates, depth=len(candidates))
    return Contestant(chosen.genome, told["scale"], told["rate"], {}, selection, tried, history=history)


def compare(runs: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Contestant]]:
    """What `save` writes, of the winners of searches by name, and all contestants.

    Raises:
        ValueError: a search that is not there or has not ended, or one called like a published loss.
    """
    found = {name: winner(run) for name, run in runs.items()}
    selection, report = judge.selection_stage(), judge.report_stage()
    others = published(selection)
    if found.keys() & others.keys():
        raise ValueError(f"a search is called as a published loss is: {min(found.keys() & others.keys())}; rename it")
    contestants = others | found
    values = _measured(report, [*contestants.values()])
    losses = dict(zip(contestants, values[0], strict=True))
    facts = {
        "torch": torch.__version__,
        "selection": dataclasses.asdict(selection),
        "report": dataclasses.asdict(report),
        "settings": {"published": [TUNED_SCALES, TUNED_RATES], "found": [SCALES, RATES]},
        "best": {
            kind: min(names, key=lambda name: contestants[name].selection)
            for kind, names in (("found", found), ("published", others))
        },
        "contestants": {
            name: _facts(one, own, {other: of for other, of in losses.items() if other != name}, report)
            for (name, one), own in zip(contestants.items(), values.swapaxes(0, 1), strict=True)
        },
    }
    return facts, contestants


def _measured(stage: Stage, contestants: Sequence[Contestant]) -> NDArray[np.float64]:
    """[measures, contestants, tasks, seeds] on the test split."""
    objectives = [objective(scaled(one.genome, one.scale)) for one in contestants]
    rates = sorted({one.rate for one in contestants})
    own = [rates.index(one.rate) for one in contestants]
    rows = []
    for regime in stage.regimes:
        of_seeds = []
        for k, seed in enumerate(stage.seeds, 1):
            arguments = {**regime.arguments, "seed": regime.arguments.get("seed", 0) + 1000 * k}
            values = measured(
                Regime(regime.name, arguments).task(), objectives, *MEASURES, horizon=stage.horizon, seeds=(seed,),
                scales=(1.0,), rates=rates, split="test",
            )  # fmt: skip
            of_seeds.append(values[:, range(len(own)), 0, own, 0])
        rows.append(torch.stack(of_seeds, -1))
    return torch.stack(rows, 2).numpy()


def _facts(
    one: Contestant, values: NDArray[np.float64], others: Mapping[str, NDArray[np.float64]], stage: Stage
) -> dict[str, Any]:
    """``values`` are [measures, tasks, seeds] of the contestant, ``others`` losses [tasks, seeds] of the others."""
    return {
        "program": one.genome.text(),
        "text": python(with_beta(one.genome)),
        "beta": BETA * one.scale,
        "rate": one.rate,
        "numbers": dict(one.numbers),
        "selection": one.selection,
        "tried": one.tried,
        "edge": one.edge,
        "lineage": [*one.history],
        **{measure: _of_tasks(stage, rows) for measure, rows in zip(MEASURES, values, strict=True)},
        "behind": {name: _of_tasks(stage, values[0] - of) for name, of in others.items()},
    }


def _of_tasks(stage: Stage, values: NDArray[np.float64]) -> dict[str, list[float]]:
    """Mean and 95 % interval over seeds, of means of tasks and by task; ``values`` are [tasks, seeds]."""
    is_deep = np.array(["hidden" in regime.arguments for regime in stage.regimes])
    groups = {"mean": np.full_like(is_deep, True), "linear policies": ~is_deep, "deeper policies": is_deep}
    rows = {name: values[own].mean(0) for name, own in groups.items() if own.any()}
    rows |= {regime.name: of for regime, of in zip(stage.regimes, values, strict=True)}
    return {name: [of.mean(), of.mean() - margin_of(of), of.mean() + margin_of(of)] for name, of in rows.items()}


def table(facts: Mapping[str, Any]) -> Table:
    """Contestants, the least loss on the tasks of the selection first."""
    best = facts["best"]["published"]
    made = Table(title="losses of policies (1: reference, 0: best) on the test split, [95 % intervals] over seeds")
    for column in ("loss", "policy", f"less that of {best}", "win rate", "KL in nats", "beta", "learning rate", "own"):
        made.add_column(column)
    for name, of in sorted(facts["contestants"].items(), key=lambda item: item[1]["selection"]):
        lead = _interval(of["behind"][best]["mean"]) if name != best else ""
        own = ", ".join(f"{number} {value:g}" for number, value in of["numbers"].items())
        measures = (_interval(of[measure]["mean"]) for measure in ("win_rate", "kl"))
        made.add_row(name, _interval(of["loss"]["mean"]), lead, *measures, f"{of['beta']:.3g}", f"{of['rate']:g}", own)
    return made


def _interval(found: Sequence[float]) -> str:
    value, low, high = found
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def save(facts: Mapping[str, Any], contestants: Mapping[str, Contestant], directory: Path) -> list[Path]:
    """Write the comparison, its picture and the curves of the losses, each whole or not at all; returns their paths."""
    return [
        write_atomic(directory / FILE, json.dumps(facts, indent=1) + "\n"),
        write_atomic(directory / PICTURE, picture(facts)),
        write_atomic(directory / CURVES, drawn(facts, contestants)),
    ]


def drawn(facts: Mapping[str, Any], contestants: Mapping[str, Contestant]) -> bytes:
    """Curves of all losses at their scales, in units of their steepest slopes, since Adam tells no units apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    values, slopes = figure.subplots(1, 2)
    for name, one in contestants.items():
        style = "-" if name == facts["best"]["found"] else ":" if one.history else "--"
        rho, loss, slope = sampled(scaled(one.genome, one.scale), SHOWN, 600)  # which leaves 0 out
        unit = slope.abs().quantile(0.95)
        values.plot(rho, (loss - loss.mean()) / unit, style, label=name)
        slopes.plot(rho, slope / unit, style)
    values.set(xlabel="rho", ylabel="loss, less its mean")
    slopes.set(xlabel="rho", ylabel="derivative", ylim=(-1.5, 0.5))
    slopes.axhline(0, color="gray", linewidth=0.5)
    values.legend(fontsize="small")
    return png(figure)


def picture(facts: Mapping[str, Any]) -> bytes:
    """Losses of the policies by task, and what divergence they are paid with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    by_task, paid = figure.subplots(1, 2, width_ratios=(2, 1))
    contestants = facts["contestants"]
    for k, (name, of) in enumerate(contestants.items()):
        rows = np.array([*of["loss"].values()])
        at = np.arange(len(rows)) + 0.8 * (k + 0.5) / len(contestants) - 0.4
        by_task.errorbar(at, rows[:, 0], yerr=rows[:, 2] - rows[:, 0], fmt="o", markersize=3, label=name)
        (kl, _, kl_high), (loss, _, loss_high) = of["kl"]["mean"], of["loss"]["mean"]
        paid.errorbar(kl, loss, xerr=kl_high - kl, yerr=loss_high - loss, fmt="o", markersize=3)
        paid.annotate(name, (kl, loss), textcoords="offset points", xytext=(4, 4), fontsize="small")
    by_task.set_xticks(range(len(rows)), [*of["loss"]], rotation=15)
    by_task.set(ylabel="loss of the policy (1: reference, 0: best)")
    by_task.legend(ncols=2, fontsize="small")
    paid.set(xlabel="KL(policy || reference), nats", ylabel="loss, mean of tasks")
    return png(figure)
