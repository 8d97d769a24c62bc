"""Time of ``optimizer.step()`` against torch's own AdamW, foreach and fused, interleaved in one run.

    python benchmarks/step.py [--device cpu] [--rounds 150] [--out FILE.json]
    python benchmarks/step.py --learned [--rounds 10] [--out FILE.json]

Three parameter sets: a 1M-parameter MLP, a 10M-parameter GPT, and 200 small tensors. Every round times one step of every
optimizer in turn; the figures are medians over the rounds, and ratios of medians. "without a compiler" is the same
metaopt optimizer held to its list and loop executions.

With ``--learned``: learned optimizers of random theta on the two models that PyLO was measured on. Times are CPU times of one
thread; "in chunks" is the execution without a compiler. PyLO's figures are those of its plain torch optimizers (commit
d05c6c1, torch 2.13), measured in the same way on another day. The last column is by how much resident memory peaks in a step.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import nn

import metaopt
from metaopt.learned import LearnedRule
from metaopt.program.build import compiler
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo2 import Celo2
from metaopt_learned.velo import VeLO

Shapes = dict[str, tuple[int, ...]]
"""Of each parameter by its name, which tells rules its role."""
Named = list[tuple[str, nn.Parameter]]


def mlp(*widths: int) -> Shapes:
    """Linear layers between these widths."""
    found: Shapes = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        found |= {f"{i}.weight": (outputs, inputs), f"{i}.bias": (outputs,)}
    return found


def gpt(width: int, layers: int, tokens: int, positions: int) -> Shapes:
    """A transformer but for its output layer."""
    block: Shapes = {
        "norm1.weight": (width,), "norm1.bias": (width,), "qkv.weight": (3 * width, width), "qkv.bias": (3 * width,),
        "proj.weight": (width, width), "proj.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "up.weight": (4 * width, width), "up.bias": (4 * width,), "down.weight": (width, 4 * width), "down.bias": (width,),
    }  # fmt: skip
    blocks = {f"{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    norm: Shapes = {"norm.weight": (width,), "norm.bias": (width,)}
    return {"token.embedding": (tokens, width), "position.embedding": (positions, width), **blocks, **norm}


def mlp_1m() -> Shapes:
    """784-784-500-10."""
    return mlp(784, 784, 500, 10)


def gpt_10m() -> Shapes:
    """6 layers of width 384 and a vocabulary of 65."""
    return {**gpt(384, 6, 65, 256), "head.weight": (65, 384)}


def tiny_200() -> Shapes:
    """200 matrices of 32 x 32."""
    return {f"{i}.weight": (32, 32) for i in range(200)}


Contenders = Callable[[Callable[[], Named], str], dict[str, torch.optim.Optimizer]]
Clock = Callable[[], float]

SETS = {"mlp 1M": mlp_1m, "gpt 10M": gpt_10m, "200 small": tiny_200}


def pylo_mlp() -> Shapes:
    """784-704-704-10."""
    return mlp(784, 704, 704, 10)


def pylo_gpt() -> Shapes:
    """10 layers of width 256 and a vocabulary of 8192, which the output shares: 124 tensors."""
    return gpt(256, 10, 8192, 128)


LEARNED_SETS = {"mlp 1M": pylo_mlp, "gpt 10M": pylo_gpt}
LEARNED: dict[str, tuple[LearnedRule, tuple[int, int] | None]] = {
    "AdafacMLP, hidden 4": (AdafacMLP(hidden=4), None),
    "AdafacMLP, hidden 32": (AdafacMLP(hidden=32), (288, 159)),
    "VeLO": (VeLO(), (98, 73)),
    "Celo2": (Celo2(), (210, 155)),
}
"""The rules, and PyLO's cost in units of AdamW foreach on the two models."""


def contenders(params: Callable[[], Named], device: str) -> dict[str, torch.optim.Optimizer]:
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


def learned_contenders(params: Callable[[], Named], device: str) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and every learned optimizer as it is and without a compiler."""
    made: dict[str, torch.optim.Optimizer] = {"torch AdamW foreach": torch.optim.AdamW(params(), foreach=True)}
    for name, (learned, _) in LEARNED.items():
        rule = learned.bind(learned.init_theta(torch.Generator().manual_seed(0)))
        made[name] = metaopt.optimizer(rule, params(), horizon=1000)
        made[f"{name}, in chunks"] = metaopt.optimizer(rule, params(), horizon=1000, execution="foreach")
    return made


def without_compiler(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after a first step that found no compiler; it does not look again."""
    with mock.patch("metaopt.cpp_kernels.compile_cpp", lambda *_: None):
        optimizer.step()
    return optimizer


def measure(
    shapes: Shapes,
    device: str,
    rounds: int,
    make: Contenders = contenders,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of one step, and peak MB above what was there before it, per optimizer."""
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}

    def params() -> Named:
        made = [
            (name, nn.Parameter(torch.randn(g.shape, generator=generator).to(device))) for name, g in gradients.items()
        ]
        for name, p in made:
            p.grad = gradients[name].clone()
        return made

    optimizers = make(params, device)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    peaks: dict[str, float] = {}
    shuffle = random.Random(0)
    for round_number in range(rounds + 3):
        order = list(optimizers.items())
        shuffle.shuffle(order)  # nobody always follows the same neighbour, and inherits its caches
        for name, optimizer in order:
            _synchronize(device)
            before = _resident_mb("VmRSS", reset=True)
            began = clock()
            optimizer.step(lambda: 1.0)
            _synchronize(device)
            if round_number >= 3:
                times[name].append(clock() - began)
                peaks[name] = max(peaks.get(name, 0.0), _resident_mb("VmHWM") - before)
    return {name: statistics.median(values) for name, values in times.items()}, peaks


def _resident_mb(line: str, reset: bool = False) -> float:
    """A line of Linux' account of the process; nan elsewhere. ``reset`` starts a new peak."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan
    return float(status.partition(f"{line}:")[2].split()[0]) / 1024


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def learned_table(rounds: int) -> tuple[Table, dict[str, Any]]:
    """Learned optimizers in units of AdamW foreach."""
    torch.set_num_threads(1)
    measured = {
        name: measure(shapes(), "cpu", rounds, learned_contenders, time.process_time)
        for name, shapes in LEARNED_SETS.items()
    }
    table = Table(title="optimizer.step(): ms of CPU time (ratio to torch AdamW foreach; PyLO's ratio); peak MB")
    table.add_column("optimizer")
    for name in LEARNED_SETS:
        table.add_column(name, justify="right")
    for optimizer in next(iter(measured.values()))[0]:
        cells = []
        for i, (times, peaks) in enumerate(measured.values()):
            own, base = times[optimizer], times["torch AdamW foreach"]
            theirs = LEARNED.get(optimizer, (None, None))[1]
            pylo = f"; PyLO {theirs[i]}" if theirs else ""
            cells.append(f"{own * 1e3:.1f} ({own / base:.1f}{pylo}); {peaks[optimizer]:.0f} MB")
        table.add_row(optimizer, *cells)
    content = {name: {"seconds": times, "peak_mb": peaks} for name, (times, peaks) in measured.items()}
    pylo = {name: dict(zip(LEARNED_SETS, theirs, strict=True)) for name, (_, theirs) in LEARNED.items() if theirs}
    return table, {"measured": content, "pylo_over_adamw_foreach": pylo}


def hand_designed_table(device: str, rounds: int) -> tuple[Table, dict[str, Any]]:
    """Hand-designed optimizers in units of both of torch's AdamWs."""
    measured = {name: measure(shapes(), device, rounds)[0] for name, shapes in SETS.items()}
    table = Table(title=f"optimizer.step() on {device}: ms (ratio to torch AdamW fused / foreach)")
    table.add_column("optimizer")
    for name in SETS:
        table.add_column(name, justify="right")
    for optimizer in next(iter(measured.values())):
        cells = []
        for times in measured.values():
            own, fused, foreach = (times[n] for n in (optimizer, "torch AdamW fused", "torch AdamW foreach"))
            cells.append(f"{own * 1e3:.3f} ({own / fused:.2f} / {own / foreach:.2f})")
        table.add_row(optimizer, *cells)
    return table, {"seconds": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--learned", action="store_true", help="learned optimizers, on one thread of the CPU")
    parser.add_argument("--rounds", type=int, help="default: 150; 10 with --learned")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.learned:
        table, measured = learned_table(given.rounds or 10)
    else:
        table, measured = hand_designed_table(given.device, given.rounds or 150)
    console = Console(width=140)
    console.print(table)
    console.print(f"C++ compiler: {compiler() or 'none'}")
    name = "step_learned.json" if given.learned else "step.json"
    out = given.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"machine": machine(given.device), "compiler": bool(compiler()), **measured}, indent=2) + "\n"
    )
    console.print(f"written: {out}")


if __name__ == "__main__":
    main()
