"""Where the sign of a momentum wins: tuned Lion beside tuned AdamW on the search suite ``sign``.

    python benchmarks/sign_regime.py [--suite sign] [--seeds 20] [--out FILE.json]

A search can be asked to find sign only where sign is better. Both rules are tuned alike and on the same seeds: the learning
rate over five decades by half-decades, then refined twice around the best one, with each pair of betas; weight decay is 0.
Fresh seeds give the table: normalised validation losses at the end, and the mean paired difference with its standard error.
Each line but the last is tuned for itself. The last has one setting for all tasks and horizons together, as a candidate of a
search has.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaopt import registry
from metaopt.program.population import Population, encode
from metaopt.task import Task
from metaopt_symbolic.evaluate import train
from metaopt_symbolic.genome import from_rule
from metaopt_symbolic.suites import SUITES, tasks_of

BETAS = ((0.0, 0.99), (0.5, 0.5), (0.5, 0.99), (0.8, 0.9), (0.9, 0.99), (0.9, 0.999), (0.95, 0.98))
"""Of both rules. As both go to 0, AdamW's step becomes the sign of the gradient, which is Lion's where its first beta is 0."""

GRID = [10 ** (-5 + k / 2) for k in range(11)]
REFINED = (1 / 4, 1 / 8)
"""Steps of log10(lr) around the best of the round before."""

HORIZONS = (50, 100, 200)
TUNE_SEEDS = range(8)
FIRST_FRESH_SEED = 1000

Cells = list[tuple[Task, int]]
"""Tasks and horizons that have one setting in common."""


def losses(cells: Cells, population: Population, seeds: range, lrs: list[float]) -> Tensor:
    """Mean over the cells of the loss at the end: [betas, learning rates, seeds]."""
    runs = [train(task, population, horizon=h, seeds=seeds, multipliers=lrs) for task, h in cells]
    return torch.stack([run.losses[..., -1] for run in runs]).mean(0)


def tuned(cells: Cells, population: Population) -> tuple[int, float]:
    """The best pair of betas, by number, and learning rate."""
    tried: dict[tuple[int, float], float] = {}
    lrs = GRID
    for width in (*REFINED, None):
        found = losses(cells, population, TUNE_SEEDS, lrs).mean(2)
        tried |= {(b, lr): float(found[b, k]) for b in range(len(BETAS)) for k, lr in enumerate(lrs)}
        best = min(tried, key=lambda setting: tried[setting])
        if width is not None:
            lrs = [best[1] * 10**-width, best[1] * 10**width]
    return best


def compare(label: str, cells: Cells, populations: dict[str, Population], seeds: int) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"task": label, "horizons": sorted({horizon for _, horizon in cells})}
    fresh = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + seeds)
    for name, population in populations.items():
        betas, lr = tuned(cells, population)
        row[name] = {
            "lr": lr,
            "betas": BETAS[betas],
            "losses": losses(cells, population, fresh, [lr])[betas, 0].tolist(),
        }
    ahead = torch.tensor(row["adamw"]["losses"]) - torch.tensor(row["lion"]["losses"])
    row["ahead"], row["standard_error"] = float(ahead.mean()), float(ahead.std() / seeds**0.5)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="sign", choices=sorted(SUITES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    populations = {
        name: encode(
            [from_rule(registry.create("optimizer", name, lr=1.0, betas=b, weight_decay=0.0)).program() for b in BETAS]
        )
        for name in ("adamw", "lion")
    }
    tasks = tasks_of(args.suite)
    lines: dict[str, Cells] = {f"{name}, {h}": [(task, h)] for name, task in tasks.items() for h in HORIZONS}
    lines["all"] = [cell for cells in lines.values() for cell in cells]
    table = Table("task, steps", "AdamW", "Lion", "Lion ahead by", "in s.e.", title=f"suite {args.suite}")
    rows = []
    for label, cells in lines.items():
        row = compare(label, cells, populations, args.seeds)
        rows.append(row)
        mean = {name: sum(row[name]["losses"]) / args.seeds for name in populations}
        shown = [f"{mean[n]:.4f} (lr {row[n]['lr']:.1e}, {row[n]['betas'][0]}, {row[n]['betas'][1]})" for n in mean]
        z = row["ahead"] / row["standard_error"]
        table.add_row(label, *shown, f"{row['ahead']:+.4f} ± {row['standard_error']:.4f}", f"{z:+.1f}")
    Console(width=150).print(table)
    if args.out:
        found = {"machine": machine(), "suite": SUITES[args.suite], "tune_seeds": len(TUNE_SEEDS), "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
