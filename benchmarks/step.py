"""Time of ``optimizer.step()`` against torch's own AdamW, foreach and fused, interleaved in one run.

    python benchmarks/step.py [--device cpu] [--rounds 150] [--out FILE.json]

Three parameter sets: a 1M-parameter MLP, a 10M-parameter GPT, and 200 small tensors. Every round times one step of every
optimizer in turn; the figures are medians over the rounds, and ratios of medians. "without a compiler" is the same
metaopt optimizer held to its list and loop executions.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import nn

import metaopt
from metaopt.program.build import compiler


def mlp_1m() -> list[tuple[int, ...]]:
    """784-784-500-10."""
    return [(784, 784), (784,), (500, 784), (500,), (10, 500), (10,)]


def gpt_10m() -> list[tuple[int, ...]]:
    """6 layers of width 384 and a vocabulary of 65."""
    width, layers = 384, 6
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
             (4 * width, width), (4 * width,), (width, 4 * width), (width,)]  # fmt: skip
    return [(65, width), (256, width), *(block * layers), (width,), (width,), (65, width)]


def tiny_200() -> list[tuple[int, ...]]:
    """200 matrices of 32 x 32."""
    return [(32, 32)] * 200


SETS = {"mlp 1M": mlp_1m, "gpt 10M": gpt_10m, "200 small": tiny_200}


def contenders(params: Callable[[], list[nn.Parameter]], device: str) -> dict[str, torch.optim.Optimizer]:
    """Every optimizer on parameters of its own."""
    made: dict[str, torch.optim.Optimizer] = {
        "torch AdamW fused": torch.optim.AdamW(params(), fused=True),
        "torch AdamW foreach": torch.optim.AdamW(params(), foreach=True),
        "metaopt adamw": metaopt.optimizer("adamw", params()),
        "metaopt lion": metaopt.optimizer("lion", params()),
        "metaopt momentum": metaopt.optimizer("momentum", params()),
    }
    if device == "cpu":
        for name in ("adamw", "lion"):
            made[f"metaopt {name}, without a compiler"] = without_compiler(metaopt.optimizer(name, params()))
    return made


def without_compiler(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after a first step that found no compiler; it does not look again."""
    with mock.patch("metaopt.execution.compile_cpp", lambda *_: None):
        optimizer.step()
    return optimizer


def measure(shapes: list[tuple[int, ...]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of one step, per optimizer."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        for p, g in zip(made, gradients, strict=True):
            p.grad = g.clone()
        return made

    optimizers = contenders(params, device)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    shuffle = random.Random(0)
    for round_number in range(rounds + 3):
        order = list(optimizers.items())
        shuffle.shuffle(order)  # nobody always follows the same neighbour, and inherits its caches
        for name, optimizer in order:
            _synchronize(device)
            began = time.perf_counter()
            optimizer.step()
            _synchronize(device)
            if round_number >= 3:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    given = parser.parse_args()
    measured = {name: measure(shapes(), given.device, given.rounds) for name, shapes in SETS.items()}
    table = Table(title=f"optimizer.step() on {given.device}: ms (ratio to torch AdamW fused / foreach)")
    table.add_column("optimizer")
    for name in SETS:
        table.add_column(name, justify="right")
    for optimizer in next(iter(measured.values())):
        cells = []
        for times in measured.values():
            own, fused, foreach = (times[n] for n in (optimizer, "torch AdamW fused", "torch AdamW foreach"))
            cells.append(f"{own * 1e3:.3f} ({own / fused:.2f} / {own / foreach:.2f})")
        table.add_row(optimizer, *cells)
    console = Console()
    console.print(table)
    console.print(f"C++ compiler: {compiler() or 'none'}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(given.device), "compiler": bool(compiler()), "seconds": measured}
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
