"""muP: do layers move alike at all widths, and does one learning rate fit them all? AdamW, with and without `MuP`.

    python benchmarks/mup.py [--quick] [--out FILE.json] [--plots FOLDER]

An MLP on digits and a transformer language model on Python's source code, each over widths 16-fold, under

* standard: initial weights of standard deviation 1 / sqrt(fan_in), attention / sqrt(d), one learning rate for all;
* muP: the same at the narrowest width; wider, output weights fall with 1 / fan_in, attention is divided by d (times the
  root of 16), and learning rates are `MuP`'s, with the narrowest model as its base. The coordinate check has muP's output
  weights at 1 / fan_in everywhere: the part of the logits that they make vanishes with width and would hide the rest.

All learning rates and seeds of one model train as one unroll. A run is judged by its mean training loss over the last
fifth of its steps; one that diverged counts as infinitely bad. Prints tables; writes JSON and two plots.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from metaopt import registry
from metaopt.evaluate.coordinate_check import CoordinateCheck, coordinate_check
from metaopt.rule import UpdateRule
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_classic.adam import AdamW
from metaopt_classic.mup import MuP

SCHEMES = ("standard", "muP")
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Model:
    """What is trained, and how long.

    Attributes:
        title: in tables and plots.
        prefix: of the registered tasks, ``{prefix}{width}``.
        widths: narrowest first.
        lrs: all that are tried.
        seeds: of each.
        steps: of each run.
        coordinate_lr: of the coordinate check.
    """

    title: str
    prefix: str
    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: int
    steps: int
    coordinate_lr: float


def octaves(low: float, high: float, per_octave: int) -> tuple[float, ...]:
    """2^low to 2^high."""
    return tuple(float(2.0**x) for x in np.linspace(low, high, round((high - low) * per_octave) + 1))


MODELS = (
    Model("MLP (digits)", "mup_mlp_w", (32, 64, 128, 256, 512), octaves(-11, -2, 2), 4, 100, 2e-3),
    Model(
        "transformer (Python source)", "mup_transformer_w", (16, 32, 64, 128, 256), octaves(-12, -3, 1), 3, 120, 2e-3
    ),
)
QUICK = (
    Model("MLP (digits)", "mup_mlp_w", (32, 64), octaves(-10, -2, 0.5), 2, 20, 2e-3),
    Model("transformer (Python source)", "mup_transformer_w", (16, 32), octaves(-10, -4, 0.5), 2, 20, 2e-3),
)


def task_of(model: Model, scheme: str, width: int, base: int) -> Task:
    """The model at one width; muP's output weights have standard deviation sqrt(base) / fan_in."""
    mup = {"mup": scheme == "muP"} if "transformer" in model.prefix else {}
    task = registry.create("task", f"{model.prefix}{width}", **mup)
    gain = (width if scheme == "standard" else base) ** 0.5  # the last hidden layer is as wide as the model
    scaled, info = copy.copy(task), task.info()

    def init(generator: Generator) -> dict[str, Tensor]:
        return {name: p * gain if info[name].role == "output" else p for name, p in task.init(generator).items()}

    scaled.init = init
    return scaled


def rule_of(model: Model, scheme: str) -> UpdateRule:
    """AdamW, alone or under `MuP`."""
    narrowest = registry.create("task", f"{model.prefix}{model.widths[0]}")
    return MuP(AdamW(), narrowest.info()) if scheme == "muP" else AdamW()


@torch.no_grad()
def losses_of(model: Model, scheme: str, width: int) -> np.ndarray:
    """Losses [lr, seed] at the end of training."""
    task, rule = task_of(model, scheme, width, model.widths[0]), rule_of(model, scheme)
    lrs = torch.tensor(model.lrs, dtype=torch.float64).repeat_interleave(model.seeds)
    carry = start(task, rule, list(range(model.seeds)) * len(model.lrs))
    losses, _ = unroll(task, rule, carry, model.steps, hp={"lr": lrs})
    last = losses[:, -max(1, model.steps // 5) :].mean(1).nan_to_num(math.inf)
    return last.reshape(len(model.lrs), model.seeds).double().numpy()


def transfer_row(model: Model, scheme: str, width: int) -> dict[str, Any]:
    """Everything about one model's learning rates: the best on average, and the best of every seed."""
    began = time.perf_counter()
    losses = losses_of(model, scheme, width)
    return {
        "model": model.title, "scheme": scheme, "width": width, "lrs": model.lrs,
        "losses": [[loss if math.isfinite(loss) else None for loss in row] for row in losses.tolist()],
        "mean": [loss if math.isfinite(loss) else None for loss in losses.mean(1).tolist()],
        "best_lr": model.lrs[int(losses.mean(1).argmin())],
        "best_lr_of_seeds": [model.lrs[i] for i in losses.argmin(0)],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def penalty(rows: list[dict[str, Any]]) -> float:
    """By what factor the widest model's loss is above its best if it takes the narrowest's learning rate."""
    narrow, wide = rows[0], rows[-1]
    loss = wide["mean"][narrow["lrs"].index(narrow["best_lr"])]
    return math.inf if loss is None else loss / min(x for x in wide["mean"] if x is not None)


def print_transfer(console: Console, title: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(title=f"{title}: best lr of the mean over seeds [range of the seeds' own]")
    for column in ("width", *rows):
        table.add_column(column, justify="right")
    for of_width in zip(*rows.values(), strict=True):
        own = [(row["best_lr"], min(row["best_lr_of_seeds"]), max(row["best_lr_of_seeds"])) for row in of_width]
        table.add_row(str(of_width[0]["width"]), *(f"{best:.2g} [{low:.2g}, {high:.2g}]" for best, low, high in own))
    table.add_section()
    table.add_row(
        "loss at the widest\nwith the narrowest's lr", *(f"{penalty(r):.2f}x its best" for r in rows.values())
    )
    console.print(table)


def print_slopes(console: Console, title: str, checks: dict[str, CoordinateCheck]) -> None:
    table = Table(title=f"{title}: power of the width with which a layer's change in 5 steps grows")
    table.add_column("layer")
    for scheme in checks:
        table.add_column(scheme, justify="right")
    slopes = {scheme: check.slopes() for scheme, check in checks.items()}
    for layer in slopes["muP"]:
        table.add_row(layer, *(f"{slopes[scheme][layer]:+.2f}" for scheme in checks))
    console.print(table)


def plot_transfer(path: Path, rows: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    figure, axes = panels(rows)
    for panel, of_widths in axes:
        for row, colour in zip(of_widths, shades(len(of_widths)), strict=True):
            losses = np.array(row["losses"], dtype=float)  # None becomes NaN, which leaves a gap
            mean = np.array(row["mean"], dtype=float)
            panel.plot(row["lrs"], mean, color=colour, marker=".", linewidth=1.4, label=f"width {row['width']}")
            panel.fill_between(row["lrs"], losses.min(1), losses.max(1), color=colour, alpha=0.15, linewidth=0)
            panel.plot(row["best_lr"], np.nanmin(mean), "*", color=colour, markersize=12, markeredgecolor="white")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("learning rate", fontsize=9)
        panel.set_ylabel("training loss, last fifth of the run", fontsize=9)
        panel.set_yscale("log")
        panel.set_ylim(top=1.3 * max(row["mean"][0] for row in of_widths))  # where the smallest lr ends
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        panel.yaxis.set_minor_formatter(ScalarFormatter())
    save(figure, path)


def plot_coordinates(path: Path, checks: dict[str, dict[str, CoordinateCheck]]) -> None:
    figure, axes = panels(checks)
    for panel, check in axes:
        for (layer, moved), colour in zip(check.moved.items(), shades(len(check.moved)), strict=True):
            last = [row[-1] for row in moved]
            panel.plot(check.widths, last, marker=".", color=colour, label=layer.removesuffix(".weight"))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(check.widths, [str(width) for width in check.widths])
        panel.set_xlabel("width", fontsize=9)
        panel.set_ylabel("mean |change| of outputs, 5 steps", fontsize=9)
    save(figure, path)


def panels(results: dict[str, dict[str, Any]]) -> tuple[Figure, list[tuple[Any, Any]]]:
    """A figure with one row per model and one column per scheme; its panels with what belongs there."""
    figure = Figure(figsize=(9.0, 3.4 * len(results)), dpi=150, layout="constrained")
    grid = figure.subplots(len(results), len(SCHEMES), squeeze=False, sharey="row")
    pairs = []
    for row, (title, of_model) in zip(grid, results.items(), strict=True):
        for panel, scheme in zip(row, SCHEMES, strict=True):
            panel.set_title(f"{title}: {scheme}", fontsize=10, loc="left")
            panel.grid(True, which="major", color="0.9", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8, which="both")
            pairs.append((panel, of_model[scheme]))
    return figure, pairs


def save(figure: Figure, path: Path) -> None:
    for panel in figure.axes[1::2]:
        panel.legend(fontsize=7.5, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": "metaopt"})


def shades(number: int) -> list[Any]:
    """Dark to light, told apart by brightness alone too."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.88, number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="narrow, short and rough: a test of this script")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "mup.json")
    parser.add_argument("--plots", type=Path, default=REPOSITORY / "docs")
    given = parser.parse_args()
    console = Console()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    checks: dict[str, dict[str, CoordinateCheck]] = {}
    for model in QUICK if given.quick else MODELS:
        rows[model.title], checks[model.title] = {}, {}
        for scheme in SCHEMES:
            checks[model.title][scheme] = coordinate_check(
                lambda width, model=model, scheme=scheme: task_of(model, scheme, width, 1),
                rule_of(model, scheme), model.widths, hp={"lr": model.coordinate_lr},
            )  # fmt: skip
            rows[model.title][scheme] = []
            for width in model.widths:
                row = transfer_row(model, scheme, width)
                rows[model.title][scheme].append(row)
                console.print(f"{model.title}, {scheme}, width {width}: {row['seconds']} s", style="dim")
        print_slopes(console, model.title, checks[model.title])
        print_transfer(console, model.title, rows[model.title])
    given.plots.mkdir(parents=True, exist_ok=True)
    plot_transfer(given.plots / "mup_transfer.png", rows)
    plot_coordinates(given.plots / "mup_coordinates.png", checks)
    result = {
        "machine": machine(),
        "transfer": [row for of_model in rows.values() for of_widths in of_model.values() for row in of_widths],
        "penalty": {t: {scheme: penalty(of_model[scheme]) for scheme in SCHEMES} for t, of_model in rows.items()},
        "coordinates": [
            {"model": title, "scheme": scheme, "widths": check.widths, "moved": check.moved, "slopes": check.slopes()}
            for title, of_model in checks.items()
            for scheme, check in of_model.items()
        ],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written: {given.out}, {given.plots / 'mup_transfer.png'}, {given.plots / 'mup_coordinates.png'}")


if __name__ == "__main__":
    main()
