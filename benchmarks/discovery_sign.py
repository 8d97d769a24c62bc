"""Whether a search from AdamW, its learning rate tuned, finds the sign on the suite where tuned Lion beats tuned AdamW.

    python benchmarks/discovery_sign.py [--seeds 3] [--children 50000] [--out FILE.json]

That Lion wins there is established by ``sign_regime.py``. A search ends when its champion, simplified, has the sign: by name,
or by what it does (`sign_valued`), as x / sqrt(x^2), x / |x|, tanh(1e6 x), or AdamW as both its betas go to 0.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import machine
from rich.console import Console

from metaopt.program.population import PopulationStep, encode
from metaopt_symbolic.baselines import START_FACTORS, baselines, tuned
from metaopt_symbolic.cascade import Cascade, usual_stages
from metaopt_symbolic.genome import SEEDS, Genome, parse
from metaopt_symbolic.search import Budget, Search, SearchConfig
from metaopt_symbolic.simplify import Simplified, simplify
from metaopt_symbolic.suites import tasks_of

SUITE = "sign"
POPULATION, BATCH = 200, 100
TOLERANCE = 0.003
"""Fitness that a line is worth: the standard error of a difference on this suite (results/sign_regime.json)."""

STEPS, SIZES = 20, (600, 400)
ALIKE, SHARE = 0.05, 0.95
"""Updates are sign-valued where this share of them, at every later step, is that close to their median in magnitude."""


def sign_valued(genome: Genome) -> float:
    """The share of updates that are of one magnitude, whatever the gradients; at the worst of the last ten steps.

    Each element has gradients of its own scale, from 1e-3 to 10, with a mean of half their deviation. Weights are 0, so that
    decay says nothing.
    """
    generator = torch.Generator().manual_seed(0)
    elements = sum(SIZES)
    scale = 10 ** (4 * torch.rand(elements, generator=generator, dtype=torch.float64) - 3)
    noise = torch.randn(STEPS, 1, elements, generator=generator, dtype=torch.float64)
    grads = scale * (noise + 0.5 * torch.randn(elements, generator=generator, dtype=torch.float64))
    population = encode([genome.program()])
    run = torch.zeros(1, dtype=torch.int64)
    step = PopulationStep(population, run, SIZES)
    times = {"lr": torch.linspace(1, 0.2, STEPS)[None], "t": torch.arange(1.0, STEPS + 1)[None]}
    numbers = population.numbers(run, times, torch.float64).expand(STEPS, -1, -1)
    slots = torch.zeros(population.kernel.inputs - 2, 1, elements, dtype=torch.float64)
    shares = []
    for k in range(STEPS):
        updates = torch.zeros(1, elements, dtype=torch.float64)
        step(updates, grads[k], slots, numbers[k])
        size = updates.abs()
        shares.append(float(((size - size.median()).abs() < ALIKE * size.median()).double().mean()))
    return min(shares[STEPS // 2 :])


def has_sign(genome: Genome) -> bool:
    """By name, or by what it does."""
    return any(a.function == "sign" for a in genome.body) or sign_valued(genome) >= SHARE


def recovered(seed: int, start: str, children: int) -> tuple[Search, Simplified]:
    """Search until the simplified champion has the sign, or until so many children were made."""
    tasks = tasks_of(SUITE)
    stages = usual_stages(list(tasks))
    last = Cascade(tasks, stages[-1:])
    config = SearchConfig(start, options={"population": POPULATION}, batch=BATCH, seed=seed)
    best: Simplified | None = None
    with tempfile.TemporaryDirectory() as directory:
        search = Search(config, Cascade(tasks, stages), directory)
        seen = ""
        while search.counts.children < children:
            search.run(Budget(children=min(children, search.counts.children + 10 * BATCH)))
            champion = search.champion.tuned
            if champion.digest != seen and has_sign(champion):
                best = simplify(champion, last.scores, tolerance=TOLERANCE)
                if has_sign(best.genome):
                    return search, best
            seen = champion.digest
        return search, simplify(search.champion.tuned, last.scores, tolerance=TOLERANCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--children", type=int, default=50_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    tasks = tasks_of(SUITE)
    last = usual_stages(list(tasks))[-1]
    start = tuned([parse(SEEDS["adamw"])], tasks, last, START_FACTORS).genome.text()
    report: dict[str, Any] = {
        "machine": machine(), "suite": SUITE, "most_children": args.children, "start": start,
        "baselines": {name: found.score.fitness for name, found in baselines(tasks, last).items()}, "runs": [],
    }  # fmt: skip
    console.print({name: round(fitness, 4) for name, fitness in report["baselines"].items()})
    for seed in range(args.seeds):
        began = time.process_time()
        search, simple = recovered(seed, start, args.children)
        run = {
            "seed": seed, "found": has_sign(simple.genome), "by_name": "sign(" in simple.genome.text(),
            "sign_valued": sign_valued(simple.genome), "children": search.counts.children, "unique": search.counts.unique,
            "fitness": search.champion.score.fitness, "start_fitness": search.start_fitness, "simplified_fitness": simple.after,
            "champion": search.champion.tuned.text(), "simplified": simple.genome.text(), "log": simple.log,
            "seconds": time.process_time() - began,
        }  # fmt: skip
        report["runs"].append(run)
        after = f"after {run['children']:,} children, {run['unique']:,} trained"
        fitness = f"fitness {run['fitness']:.4f} (simplified {simple.after:.4f})"
        console.print(
            f"seed {seed}: {'sign' if run['found'] else 'no sign'} {after}, {fitness}, {run['seconds']:.0f} s"
        )
        console.print(run["simplified"], highlight=False)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
