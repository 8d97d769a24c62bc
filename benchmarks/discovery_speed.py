"""How fast a search is on one core: children, fingerprints, trained candidates and inner steps per CPU-second.

Usage: python benchmarks/discovery_speed.py

The population is what evolution makes of AdamW in 5,000 children, so programs have the lengths and redundancy of a search.
Training is the cascade of ``metaopt discover rule`` on the suite "search", on candidates that are structurally different.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt.files import write_atomic
from metaopt.program.population import encode
from metaopt_symbolic.analysis import analyse, live_part
from metaopt_symbolic.cascade import Cascade, usual_stages
from metaopt_symbolic.evaluate import train
from metaopt_symbolic.fingerprint import fingerprint
from metaopt_symbolic.genome import SEEDS, parse
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.planted import Planted
from metaopt_symbolic.population import Genomes
from metaopt_symbolic.search import Budget, Search, SearchConfig
from metaopt_symbolic.suites import tasks_of


def per_second(count: float, call: Callable[[], Any], seconds: float = 3.0) -> float:
    """Of things that one call makes ``count`` of: the best rate of the calls that fit into ``seconds``."""
    call()
    best, until = 0.0, time.process_time() + seconds
    while time.process_time() < until:
        began = time.process_time()
        call()
        best = max(best, count / (time.process_time() - began))
    return best


def evolved(count: int) -> Genomes:
    """Members of a population after 5,000 children."""
    with tempfile.TemporaryDirectory() as directory:
        config = SearchConfig(SEEDS["adamw"], options={"population": count}, batch=100)
        search = Search(config, Planted(parse(SEEDS["lion"])), directory)
        search.run(Budget(children=5000))
        members: Genomes = search._searcher._members  # type: ignore[attr-defined]
        return members


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "discovery_speed.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    members, generator, rows = evolved(1000), np.random.default_rng(0), dict[str, float]()
    mutation = Mutation()
    rows["children mutated and analysed (1,000 at once)"] = per_second(
        1000, lambda: analyse(mutation.children(members, generator))
    )
    few = members.select(np.arange(100))
    rows["children mutated and analysed (100 at once)"] = per_second(
        100, lambda: analyse(mutation.children(few, generator))
    )
    few_programs = [few[k].program() for k in range(len(few))]
    rows["fingerprints"] = per_second(100, lambda: fingerprint(few_programs))
    found = analyse(members)
    _, different = np.unique(found.hashes, return_index=True)
    programs = [live_part(members[int(k)], found, int(k)).program() for k in different]
    prints = fingerprint(programs)
    programs = [programs[k] for k in np.flatnonzero(prints.finite & prints.uses_gradient)]
    tasks = tasks_of("search")
    stages = usual_stages(list(tasks))

    def judged() -> None:
        Cascade(tasks, stages).scores(programs)

    rows[f"candidates through the cascade ({len(programs)} at once)"] = per_second(len(programs), judged, 20.0)
    population = encode(programs)
    for name, horizon in (("digits_tanh", 50), ("ill_conditioned", 50)):
        task = tasks[name]
        size = sum(p.numel() for p in task.init(torch.Generator()).values())
        rows[f"inner steps, {name}, {size:,} parameters"] = per_second(
            len(programs) * horizon,
            lambda: train(task, population, horizon=horizon, seeds=(0,)),  # noqa: B023
        )
    table = Table("what", "per CPU-second", title="a search on one core")
    for name, rate in rows.items():
        table.add_row(name, f"{rate:,.0f}")
    Console().print(table)
    mean = float(members.lengths.mean())
    content = {"machine": machine(), "mean_statements": mean, "programs": len(programs), "per_cpu_second": rows}
    print(f"written: {write_atomic(out, json.dumps(content, indent=1) + chr(10))}")


if __name__ == "__main__":
    main()
