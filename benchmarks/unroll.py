"""Inner steps per second of K training runs in lock-step: digits MLP (64-32-10, batch 64), AdamW and a learned optimizer.

    python benchmarks/unroll.py [--copies 1 16 64 256] [--backends eager compile fused] [--device cpu] [--out FILE.json]

Prints one table and writes JSON beside it. An inner step is loss, gradient and update of one training run; the peer
figure to compare with is a plain torch loop over single runs with ``torch.optim.AdamW``, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import nn

from metaopt import registry
from metaopt.rule import UpdateRule
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_learned.adafac_mlp import AdafacMLP

ROUNDS, SECONDS_PER_ROUND = 5, 0.5


def torch_loop(task: Task) -> float:
    """The peer: one run at a time, written as in any tutorial; steps per second."""
    images, labels = task.train.tensors.values()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(task.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = torch.randint(len(images), (task.batch_size,), device=task.device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch].flatten(1)), labels[batch]).backward()
            optimizer.step()

    return _steps_per_second(run, 1, task.device)


@torch.no_grad()
def ours(task: Task, rule: UpdateRule, copies: int, backend: str) -> float:
    """Steps per second of all copies together."""
    carry = start(task, rule, list(range(copies)))

    def run(steps: int) -> None:
        unroll(task, rule, carry, steps, backend=backend)

    return _steps_per_second(run, copies, task.device)


def _steps_per_second(run: Any, copies: int, device: torch.device) -> float:
    def timed(steps: int) -> float:
        began = time.perf_counter()
        run(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed(2)  # compile, warm caches
    steps = max(2, int(SECONDS_PER_ROUND / max(timed(2) / 2, 1e-6)))
    return statistics.median(copies * steps / timed(steps) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--backends", nargs="+", default=["eager", "compile", "fused"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "unroll.json")
    given = parser.parse_args()
    task = registry.create("task", "digits_mlp", device=given.device)
    rules: dict[str, UpdateRule] = {"adamw": registry.create("optimizer", "adamw")}
    for hidden in (4, 32):
        learned = AdafacMLP(hidden=hidden)
        theta = learned.init_theta(torch.Generator().manual_seed(0))
        rules[f"small_fc_lopt, hidden {hidden}"] = learned.bind(theta).to(given.device)
    console = Console()
    peer = torch_loop(task)
    table = Table(title=f"inner steps/s, digits MLP, {given.device}; one torch.optim.AdamW(fused) loop: {peer:,.0f}")
    for column in ("rule", "backend", *(f"K = {k}" for k in given.copies)):
        table.add_column(column, justify="left" if column in ("rule", "backend") else "right")
    rows = []
    for name, rule in rules.items():
        for backend in given.backends:
            speeds = []
            for k in given.copies:
                speeds.append(ours(task, rule, k, backend))
                console.print(f"{name}, {backend}, K = {k}: {speeds[-1]:,.0f}", style="dim")
            table.add_row(name, backend, *(f"{s:,.0f} ({s / peer:.1f}x)" for s in speeds))
            rows.append(
                {"rule": name, "backend": backend, "steps_per_second": dict(zip(given.copies, speeds, strict=True))}
            )
    console.print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"machine": machine(given.device), "torch_loop": peer, "rows": rows}, indent=2) + "\n"
    )
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
