"""Searches over programs beside their controls: the numbers of AdamW alone, and chance, with as many trained candidates each.

    python benchmarks/discovery_controls.py [--unique 1500] [--seeds 8] [--out FILE.json]

All start from tuned AdamW and are judged by the same stages on the suite ``search``. The champion of each is chosen by that
fitness alone. It is then trained on what no search saw: the same tasks twice as wide, for four times as many steps and with
other seeds, and tasks with other data. There, learning rates of champions, AdamW and Lion are tuned alike (`funnel.compare`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt import registry
from metaopt.evaluate.statistics import Estimate, estimate
from metaopt_symbolic.baselines import baselines, tuned_start
from metaopt_symbolic.cascade import Cascade, usual_stages
from metaopt_symbolic.funnel import Gate, Result, compare
from metaopt_symbolic.genome import SEEDS, Genome
from metaopt_symbolic.search import Budget, Search, SearchConfig
from metaopt_symbolic.suites import tasks_of

SUITE = "search"
POPULATION, TOURNAMENT, BATCH = 200, 10, 100
SEARCHERS: dict[str, dict[str, Any]] = {
    "effective": {
        "population": POPULATION,
        "tournament": TOURNAMENT,
        "mutation": {"tune": 3.0, "splice": 0.5, "duplicate": 0.3, "scales": (1.0, 0.3, 0.1), "complement": 0.5},
    },
    "evolution": {"population": POPULATION, "tournament": TOURNAMENT},
    "constants": {"population": POPULATION, "tournament": TOURNAMENT},
    "random": {},
}
WIDER, LONGER = 2, 1200
OTHER_DATA, OTHER_HORIZON = ("textures8_mlp_gelu", "mixtures_mlp", "wine_mlp", "teacher_8d_mlp", "iris_mlp"), 300


def searched(name: str, seed: int, start: str, unique: int) -> tuple[Search, list[tuple[int, float]]]:
    """A search, and after each generation the number of trained candidates and the fitness of the best."""
    tasks = tasks_of(SUITE)
    config = SearchConfig(start, name, options=SEARCHERS[name], batch=BATCH, seed=seed)
    curve = []
    with tempfile.TemporaryDirectory() as directory:
        search = Search(config, Cascade(tasks, usual_stages(list(tasks))), directory)

        def note(search: Search) -> None:
            curve.append((search.counts.unique, search.champion.score.fitness))

        search.run(Budget(unique=unique), on_generation=note)
    return search, curve


def held_out() -> list[Gate]:
    """What no search saw."""
    return [
        Gate("longer and wider", tasks_of(SUITE, WIDER), LONGER),
        Gate("other data", {name: registry.create("task", name) for name in OTHER_DATA}, OTHER_HORIZON),
    ]


def ahead_of_adamw(results: Sequence[Sequence[Result]]) -> dict[str, float]:
    """Contender -> mean over tasks and seeds of all gates of AdamW's loss minus its own."""
    losses: dict[str, list[float]] = {}
    for gate in results:
        for r in gate:
            losses.setdefault(r.contender, []).extend(float(np.mean(r.losses[task])) for task in sorted(r.losses))
    return {name: float(np.mean(losses["adamw"]) - np.mean(own)) for name, own in losses.items()}


def picture(report: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, dots = figure.subplots(1, 2)
    grid = np.linspace(0, report["unique"], 200)
    for k, (name, runs) in enumerate(report["searches"].items()):
        lines = np.array([
            np.concatenate([[report["start_fitness"]], [f for _, f in run["curve"]]])[
                np.searchsorted([u for u, _ in run["curve"]], grid, side="right")
            ]
            for run in runs
        ])  # fmt: skip
        curves.plot(grid, lines.mean(0), color=f"C{k}", label=name)
        curves.fill_between(grid, lines.min(0), lines.max(0), color=f"C{k}", alpha=0.2)
        dots.plot([k] * len(runs), [run["ahead"] for run in runs], "o", color=f"C{k}", alpha=0.5)
        e = report["held_out"][name]
        dots.errorbar(
            k + 0.15, e["iqm"], [[e["iqm"] - e["low"]], [e["high"] - e["iqm"]]], color=f"C{k}", marker="_", capsize=4
        )
    for style, (name, fitness) in zip(("--", ":"), report["baselines"].items(), strict=True):
        curves.axhline(fitness, color="gray", linestyle=style, label=f"tuned {name}")
    curves.set(xlabel="trained candidates", ylabel="fitness of the best", title="on the tasks of the search")
    curves.legend()
    dots.axhline(0, color="gray", linestyle="--")
    dots.axhline(report["lion_ahead"], color="gray", linestyle=":")
    dots.set_xticks(range(len(report["searches"])), list(report["searches"]))
    dots.set(ylabel="loss below that of tuned AdamW", title="champions on held-out tasks")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def shown(e: Estimate) -> str:
    return f"{e.iqm:+.4f} [{e.low:+.4f}, {e.high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unique", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    began = time.process_time()
    tasks = tasks_of(SUITE)
    last = usual_stages(list(tasks))[-1]
    start = tuned_start(SEEDS["adamw"], tasks, usual_stages(list(tasks)))
    report: dict[str, Any] = {
        "machine": machine(),
        "suite": SUITE,
        "unique": args.unique,
        "searches": {},
        "options": SEARCHERS,
    }
    report["baselines"] = {name: found.score.fitness for name, found in baselines(tasks, last).items()}
    champions: dict[str, Genome] = {}
    for name in SEARCHERS:
        report["searches"][name] = []
        for seed in range(args.seeds):
            search, curve = searched(name, seed, start, args.unique)
            report["start_fitness"] = search.start_fitness
            champions[f"{name} {seed}"] = search.champion.tuned
            report["searches"][name].append({
                "seed": seed, "fitness": search.champion.score.fitness, "curve": curve, "hits": search.counts.hits,
                "redundancy": search.counts.redundancy, "counts": dataclasses.asdict(search.counts),
                "champion": search.champion.tuned.text(),
            })  # fmt: skip
            console.print(f"{name} {seed}: {search.champion.score.fitness:.4f}, {time.process_time() - began:.0f} s")
    results = [compare(champions, gate) for gate in held_out()]
    ahead = ahead_of_adamw(results)
    report["lion_ahead"] = ahead["lion"]
    report["gates"] = [[dataclasses.asdict(r) for r in gate] for gate in results]
    table = Table(
        "searcher", "fitness on the search's tasks", "ahead of tuned AdamW, held out", "effective ahead of it, held out"
    )
    own = {name: [ahead[f"{name} {seed}"] for seed in range(args.seeds)] for name in SEARCHERS}
    report["held_out"], report["effective_ahead_of"] = {}, {}
    for name, runs in report["searches"].items():
        for run, value in zip(runs, own[name], strict=True):
            run["ahead"] = value
        found = estimate([own[name]])
        beaten = estimate([np.subtract(own["effective"], own[name])])
        report["held_out"][name] = dataclasses.asdict(found)
        report["effective_ahead_of"][name] = dataclasses.asdict(beaten)
        fitness = estimate([[run["fitness"] for run in runs]])
        table.add_row(name, shown(fitness), shown(found), "" if name == "effective" else shown(beaten))
    for name, fitness in report["baselines"].items():
        table.add_row(f"tuned {name}", f"{fitness:+.4f}", f"{ahead[name]:+.4f}", "")
    report["seconds"] = time.process_time() - began
    console.print(table)
    console.print(f"{report['seconds']:.0f} s of one core")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        picture(report, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
