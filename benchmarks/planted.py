"""Does the search find what is there? Known optimizers are hidden behind their updates; the search starts from AdamW.

    python benchmarks/planted.py [--hidden lion ...] [--seeds 5] [--unique 25000] [--out FILE.json]

Fitness is the match to the hidden optimizer's updates (`metaopt_symbolic.planted.Planted`), never to its text. A search has
succeeded when its champion's updates differ from the hidden ones by less than 2 % on gradients that it has not seen. All
optimizers and seeds have the same settings; the searcher is ``effective`` as `metaopt discover rule --searcher` has it. The
budget of evaluations is that of a search of Lion's paper (20 to 30 thousand).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt import registry
from metaopt_symbolic.genome import SEEDS, parse
from metaopt_symbolic.planted import SOLVED, Planted
from metaopt_symbolic.search import Budget, Candidate, Search, SearchConfig

HIDDEN = ("lion", "rmsprop", "momentum", "adabelief")
START, SEARCHER, BATCH = "adamw", "effective", 100
FRESH_PROBES = 1
"""Seed of the probes that say whether it is solved; the search has those of seed 0."""


def recover(name: str, seed: int, unique: int) -> dict[str, Any]:
    """Search until the hidden optimizer is found or the budget is spent."""
    hidden = parse(SEEDS[name])
    fresh = Planted(hidden, seed=FRESH_PROBES)
    champion: Candidate | None = None
    error = math.inf

    class Found(Exception):
        pass

    def look(search: Search) -> None:
        nonlocal champion, error
        if search.champion is not champion:
            champion = search.champion
            error = fresh.error(champion.genome.program())
            if error < SOLVED:
                raise Found

    config = SearchConfig(SEEDS[START], SEARCHER, judge=f"planted {name}", batch=BATCH, seed=seed)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        search = Search(config, Planted(hidden), directory)
        with contextlib.suppress(Found):
            search.run(Budget(unique=unique), on_generation=look, save_every=math.inf)
    return {
        "hidden": name,
        "seed": seed,
        "solved": error < SOLVED,
        "unique": search.counts.unique,
        "children": search.counts.children,
        "error": error,
        "cpu_seconds": time.process_time() - began,
        "program": search.champion.genome.text(),
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each optimizer: how many seeds found it, and medians over all seeds, None if most did not."""
    rows = []
    for name in dict.fromkeys(run["hidden"] for run in runs):
        own = [run for run in runs if run["hidden"] == name]
        row: dict[str, Any] = {"hidden": name, "seeds": len(own), "solved": sum(run["solved"] for run in own)}
        for key in ("unique", "children", "cpu_seconds"):
            median = statistics.median(run[key] if run["solved"] else math.inf for run in own)
            row[key] = median if math.isfinite(median) else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", nargs="+", default=HIDDEN, choices=sorted(SEEDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--unique", type=int, default=25_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planted.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    runs = []
    for name in args.hidden:
        for seed in range(args.seeds):
            run = recover(name, seed, args.unique)
            runs.append(run)
            console.print(
                f"{name}, seed {seed}: {'found' if run['solved'] else 'NOT FOUND'} after {run['unique']} evaluations of "
                f"{run['children']} children, error {run['error']:.2g}, {run['cpu_seconds']:.0f} s"
            )
    table = Table("hidden", "found", "unique", "children", "CPU s", title=f"from {START}, medians until found")
    for row in summary(runs):
        shown = ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("unique", "children", "cpu_seconds")]
        table.add_row(row["hidden"], f"{row['solved']} of {row['seeds']}", *shown)
    console.print(table)
    settings = {
        "start": START, "searcher": SEARCHER, "options": registry.get("proposer", SEARCHER).defaults, "batch": BATCH,
        "unique": args.unique, "solved_below": SOLVED,
    }  # fmt: skip
    found = {"machine": machine(), "settings": settings, "summary": summary(runs), "runs": runs}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
