"""Bias and spread of every gradient estimator against the length of episodes, at equally many inner steps per estimate.

    python benchmarks/estimators.py [--budget 640] [--estimates 1000] [--out FILE.json]

Two inner problems: a linear system with a quadratic loss, whose meta-gradient is computed exactly, and training of a small
MLP on digits with ``small_fc_lopt``, whose meta-gradient is a mean of `FullUnroll` over many runs. Writes JSON, the tables
of docs/estimators.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from report import machine
from rich.console import Console
from torch import Tensor

from metaopt import registry
from metaopt.learned import Theta, to_vector
from metaopt.meta.inner import TrainingRuns
from metaopt.meta.truncation import Constant
from metaopt_learned.adafac_mlp import AdafacMLP

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "estimators.md", ROOT / "docs" / "estimators.png"
BEGIN, END = "<!-- tables: benchmarks/estimators.py -->", "<!-- end of tables -->"
WINDOW = 5
LENGTHS = {"linear system": (5, 10, 20, 40, 80, 160, 320), "digits MLP": (5, 20, 80)}
RUNS_PER_COPY = {"pes_analytic": 4, "full_unroll": 1, "truncated_unroll": 1, "forward_gradient": 1}  # others: a pair
BATCHES = 10
"""Estimates of one episode's windows are correlated, so errors of means are those of the means of so many batches."""

AVERAGED = 100
"""Estimates whose mean the picture shows."""


class LinearSystem:
    """s_t = 0.95 s_{t-1} + 0.1 (theta + 0.3 cos(t) A theta), s_0 = 1, in 16 dimensions; loss |s_t - 0.5|^2 / 2."""

    size = 16
    worst: float | None = None

    def __init__(self, horizon: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.horizon = horizon
        self.mix = torch.randn(self.size, self.size, generator=generator, dtype=torch.float64) / self.size**0.5

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        return torch.full((len(seeds),), self.horizon)

    def start(self, theta: Theta, seeds: Tensor, lengths: Tensor) -> dict[str, Any]:
        s = torch.ones(len(seeds), self.size, dtype=torch.float64)
        return {"s": s, "t": torch.zeros(len(seeds), 1, dtype=torch.float64)}

    def run(self, theta: Theta, state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        s, t, losses = state["s"], state["t"], []
        drive, mixed = 0.1 * theta["theta"], 0.03 * theta["theta"] @ self.mix
        for _ in range(steps):
            t = t + 1
            s = 0.95 * s + drive + torch.cos(t) * mixed
            losses.append(0.5 * (s - 0.5).square().sum(1))
        return torch.stack(losses, 1), {"s": s, "t": t}

    def judge(self, theta: Theta, state: dict[str, Any]) -> Tensor:
        return 0.5 * (state["s"] - 0.5).square().sum(1)


def problem(name: str, horizon: int) -> tuple[Any, Theta, int]:
    """The inner problem, theta, and how many runs its exact gradient is averaged over at a time."""
    if name == "linear system":
        generator = torch.Generator().manual_seed(1)
        theta = {"theta": 0.2 * torch.randn(LinearSystem.size, generator=generator, dtype=torch.float64)}
        return LinearSystem(horizon), theta, 1
    learned = AdafacMLP(hidden=4, step_scale=0.01)
    task = registry.create("task", "digits_mlp", hidden=[8], batch_size=16)
    return TrainingRuns(task, learned, Constant(horizon)), learned.init_theta(torch.Generator().manual_seed(0)), 64


def copies(name: str, horizon: int, budget: int) -> int:
    """How many copies take ``budget`` inner steps in one estimate; at least one."""
    steps = horizon if name.startswith("full") else WINDOW
    return max(1, budget // (steps * RUNS_PER_COPY.get(name, 2)))


def make(name: str, n: int) -> Any:
    counted = "pairs" if RUNS_PER_COPY.get(name, 2) % 2 == 0 else "copies"
    window = {} if name.startswith("full") else {"window": WINDOW}
    return registry.create("estimator", name, **{counted: n}, **window)


def measure(
    name: str, where: str, horizon: int, budget: int, estimates: int, exact: Tensor, exact_error: float
) -> dict[str, Any]:
    """Bias, its error and the spread of single estimates, all relative to the norm of the exact gradient."""
    inner, theta, _ = problem(where, horizon)
    n = copies(name, horizon, budget)
    estimator = make(name, n)
    carry = estimator.start(inner, theta, seed=1)
    warmup = 0
    if not name.startswith("full"):
        warmup = -(-horizon // WINDOW)
        estimates = max(estimates, BATCHES * warmup)  # a batch lasts as long as an episode
    found, steps, seconds = [], 0.0, 0.0
    for number in range(warmup + estimates):
        began = time.process_time()
        gradient, carry, metrics = estimator.estimate(inner, theta, carry)
        if number >= warmup:
            seconds += time.process_time() - began
            steps += metrics["inner_steps"]
            found.append(to_vector(gradient).double())
    samples, scale = torch.stack(found), float(exact.norm())
    mean = samples.mean(0)
    batches = samples[: estimates // BATCHES * BATCHES].unflatten(0, (BATCHES, -1)).mean(1)
    error = float(batches.var(0).sum().sqrt()) / math.sqrt(BATCHES) / scale
    return {
        "estimator": name, "problem": where, "horizon": horizon, "copies": n,
        "bias": float((mean - exact).norm()) / scale,
        "bias_error": math.hypot(error, exact_error / scale),
        "spread": float(samples.var(0).sum().sqrt()) / scale,
        "long_run_spread": error * math.sqrt(estimates),
        "ms_per_thousand_steps": 1e6 * seconds / steps,
    }  # fmt: skip


def exact_gradient(where: str, horizon: int) -> tuple[Tensor, float]:
    """The mean of `BATCHES` gradients by `FullUnroll`, and its standard error."""
    inner, theta, runs = problem(where, horizon)
    estimator = registry.create("estimator", "full_unroll", copies=runs)
    found, carry = [], estimator.start(inner, theta, seed=1234)
    for _ in range(BATCHES):
        gradient, carry, _ = estimator.estimate(inner, theta, carry)
        found.append(to_vector(gradient).double())
    return torch.stack(found).mean(0), float(torch.stack(found).var(0).sum().sqrt()) / math.sqrt(BATCHES)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _seen_bias(row: dict[str, Any]) -> float:
    """The bias, or 0 where it does not stand out from its error."""
    return row["bias"] if row["bias"] > max(3 * row["bias_error"], 1e-9) else 0.0


def _bias(row: dict[str, Any]) -> str:
    if row["bias"] < 1e-9:
        return "0"
    return _number(_seen_bias(row)) if _seen_bias(row) else f"< {_number(3 * row['bias_error'])}"


def _spread(row: dict[str, Any]) -> str:
    if row["spread"] < 1e-9:
        return "0"
    return f"{_number(row['spread'])} ({_number(row['long_run_spread'])})"


def tables(found: dict[str, Any]) -> str:
    """The part of the page that numbers make."""
    lines = [BEGIN, ""]
    for where, lengths in LENGTHS.items():
        rows = {(row["estimator"], row["horizon"]): row for row in found["rows"] if row["problem"] == where}
        names = list(dict.fromkeys(name for name, _ in rows))
        for title, cell in (
            ("standard deviation of one estimate (and √M times that of the mean of M in a row)", _spread),
            ("bias", _bias),
        ):
            lines += [
                f"**{where}, {title}**, in units of the norm of the exact gradient, by the length T of episodes", "",
                "| estimator | " + " | ".join(f"T = {t}" for t in lengths) + " |",
                "|---|" + "---|" * len(lengths),
                *(f"| `{n}` | " + " | ".join(cell(rows[n, t]) for t in lengths) + " |" for n in names), "",
            ]  # fmt: skip
        if where == "digits MLP":
            lines += [
                f"**digits MLP, CPU time per 1,000 inner steps** (ms, T = {lengths[-1]})", "",
                "| " + " | ".join(f"`{n}`" for n in names) + " |", "|" + "---|" * len(names),
                "| " + " | ".join(f"{rows[n, lengths[-1]]['ms_per_thousand_steps']:.0f}" for n in names) + " |", "",
            ]  # fmt: skip
    return "\n".join([*lines, END])


def picture(found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, where in zip(axes, LENGTHS, strict=True):
        rows = [row for row in found["rows"] if row["problem"] == where]
        for i, name in enumerate(dict.fromkeys(row["estimator"] for row in rows)):
            own = [row for row in rows if row["estimator"] == name]
            errors = [math.hypot(_seen_bias(row), row["long_run_spread"] / AVERAGED**0.5) for row in own]
            style = "o--" if name.startswith(("es", "truncated")) else "o-"
            axis.plot([row["horizon"] for row in own], errors, style, color=f"C{i}", label=name, markersize=3)
        axis.set(xscale="log", yscale="log", xlabel="length of episodes T", title=where, ylim=(3e-3, 2))
        axis.set_xticks(LENGTHS[where], map(str, LENGTHS[where]))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"error of the mean of {AVERAGED}\nestimates in a row / |gradient|")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=640, help="inner steps per estimate")
    parser.add_argument("--estimates", type=int, default=1000, help="per row; a fiftieth of it for the MLP")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "estimators.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console, rows = Console(), []
    for where, lengths in LENGTHS.items():
        estimates = given.estimates if where == "linear system" else max(BATCHES, given.estimates // 50)
        for horizon in lengths:
            exact, exact_error = exact_gradient(where, horizon)
            for name in registry.specs("estimator"):
                row = measure(name, where, horizon, given.budget, estimates, exact, exact_error)
                rows.append(row)
                console.print(
                    f"{where}, T = {horizon}, {name}: spread {_number(row['spread'])}, bias {_bias(row)}", style="dim"
                )
    found = {"machine": machine(), "budget": given.budget, "window": WINDOW, "estimates": given.estimates, "rows": rows}
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + tables(found) + page[page.index(END) + len(END) :])
    picture(found)
    console.print(f"written: {given.out}, {PAGE}, {PICTURE}")


if __name__ == "__main__":
    main()
