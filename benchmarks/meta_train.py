"""Inner steps per CPU-second of meta-training with PES, and seconds from process start to the first outer step.

    python benchmarks/meta_train.py [--pairs 16 64] [--rounds 9] [--out FILE.json]

Whole outer steps on one thread: 64-32-10 MLP on digits, batch 64; PES with N antithetic pairs, sigma 0.01, window 20,
staggered episodes of 100 steps; outer Adam, lr 3e-4. An inner step is loss, gradient and update of one of the 2 N runs.
Figures are medians of CPU time, which other processes on the machine disturb less than wall time. The first outer step is
that of ``metaopt meta-train`` in a process of its own, with and without compiled steps in the cache.

Beside it the same work by google/learned_optimization: measured here where it can be imported, else as in `PEER`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peer_learned_optimization
import torch
from report import machine
from rich.console import Console
from rich.table import Table

import metaopt
from metaopt import registry
from metaopt.learned import LearnedRule
from metaopt.meta.inner import TrainingRuns
from metaopt.meta.truncation import Constant
from metaopt.program.build import compiler
from metaopt_learned.estimators.pes import PES

WINDOW, EPISODE = 20, 100
RULES: dict[str, dict[str, Any]] = {
    "MLPLOpt": {"name": "mlp_lopt"},
    "AdafacMLP, hidden 4": {"name": "small_fc_lopt", "hidden": 4},
    "AdafacMLP, hidden 32": {"name": "small_fc_lopt", "hidden": 32},
    "Celo2": {"name": "celo2"},
}
PEER: dict[str, dict[int, int]] = {
    "MLPLOpt": {16: 2274, 64: 1682},
    "AdafacMLP, hidden 4": {16: 1957, 64: 1584},
    "AdafacMLP, hidden 32": {16: 1140, 64: 902},
}
"""Inner steps per CPU-second of google/learned_optimization (commit 32186aa, JAX 0.10.2) at this work, on one core of an AMD
EPYC that other processes kept busy; medians of 12 outer steps or more, compiling excluded."""


def outer_steps(learned: LearnedRule, pairs: int, rounds: int) -> list[float]:
    """CPU seconds of each of ``rounds`` outer steps, after a whole episode."""
    task = registry.create("task", "digits_mlp")
    inner = TrainingRuns(task, learned, Constant(EPISODE))
    estimator = PES(pairs=pairs, sigma=0.01, window=WINDOW)
    theta = {
        name: torch.nn.Parameter(value) for name, value in learned.init_theta(torch.Generator().manual_seed(0)).items()
    }
    outer = metaopt.optimizer("adam", list(theta.items()), lr=3e-4)
    carry = estimator.start(inner, {name: p.detach() for name, p in theta.items()}, 0)
    times = []
    for _ in range(EPISODE // WINDOW + rounds):
        began = time.process_time()
        gradient, carry, _ = estimator.estimate(inner, {name: p.detach() for name, p in theta.items()}, carry)
        for name, p in theta.items():
            p.grad = gradient[name]
        outer.step()
        times.append(time.process_time() - began)
    return times[EPISODE // WINDOW :]


def peer() -> dict[str, Any]:
    """Whether the peer's figures are measured here, and of which versions they are."""
    try:
        return {"measured_here": True} | peer_learned_optimization.versions()
    except ImportError as error:
        return {"measured_here": False, "why": str(error), "learned_optimization": "32186aa", "jax": "0.10.2"}


def first_outer_step(name: str, options: dict[str, Any], cache: Path) -> dict[str, float]:
    """Seconds of a process that makes one outer step and exits: on the clock, and of all its processors' time."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "metaopt", "meta-train", name, "--steps", "1", "--out", f"{directory}/run"]
        for option, value in options.items():
            command += ["--set-learned", f"{option}={value}"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            command, check=True, capture_output=True, env=os.environ | {"METAOPT_CACHE_DIR": str(cache)}, cwd=directory
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = time.perf_counter() - began
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "meta_train.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    table = Table(title="PES, digits MLP 64-32-10, one thread: inner steps per CPU-second (over the peer's)")
    for column in ("learned optimizer", *(f"N = {n}" for n in given.pairs), "first outer step, cold / warm cache"):
        table.add_column(column, justify="left" if column == "learned optimizer" else "right")
    rows, beside = [], peer()
    for label, options in RULES.items():
        options = dict(options)
        name = options.pop("name")
        learned = registry.create("learned_optimizer", name, **options)
        row: dict[str, Any] = {"rule": label, "steps_per_cpu_second": {}, "peer": {}, "peer_first_outer_step": {}}
        cells = []
        for n in given.pairs:
            seconds = statistics.median(outer_steps(learned, n, given.rounds))
            speed = 2 * n * WINDOW / seconds
            row["steps_per_cpu_second"][n] = speed
            if label in PEER and beside["measured_here"]:
                found = peer_learned_optimization.measure(label, n, given.rounds)
                row["peer"][n] = found["steps_per_cpu_second"]
                row["peer_first_outer_step"][n] = found["first_outer_step"]
            elif n in PEER.get(label, {}):
                row["peer"][n] = PEER[label][n]
            cells.append(f"{speed:,.0f}" + (f" ({speed / row['peer'][n]:.1f}x)" if n in row["peer"] else ""))
            console.print(f"{label}, N = {n}: {cells[-1]}", style="dim")
        with tempfile.TemporaryDirectory() as cache:
            row["first_outer_step"] = {
                state: first_outer_step(name, options, Path(cache)) for state in ("cold", "warm")
            }
        cells.append(" / ".join(f"{at['wall']:.1f} s ({at['cpu']:.1f} CPU)" for at in row["first_outer_step"].values()))
        table.add_row(label, *cells)
        rows.append(row)
    console.print(table)
    console.print(f"C++ compiler: {compiler() or 'none'}")
    console.print(f"learned_optimization: {beside}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "compiler": bool(compiler()), "peer": beside, "rows": rows}
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
