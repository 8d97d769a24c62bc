"""What changes to AdamW that papers propose bring on the tasks of the funnel, all tuned alike: what a search may hope to find.

    python benchmarks/discovery_headroom.py [--suite search] [--out FILE.json]

Contenders are programs of the search with the betas and weight decays that AdamW is tuned over and as many learning rates, of
which each has its best for each task, chosen on seeds apart. No search takes part. AdamW itself has bias correction; the
programs have none, as in the paper.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt_symbolic.baselines import LEARNING_RATES, SETTINGS
from metaopt_symbolic.funnel import ranked, usual_gates
from metaopt_symbolic.genome import Genome, parse


def program(*, gradient: str = "", squared: str = "g", ahead: str = "", update: str = "", schedule: str = "") -> str:
    """AdamW with lines of its own, separated by semicolons, in some places; ``ahead`` makes what stands over the root."""
    made = f"""{gradient}; g2 = square({squared}); m = interpolate(g, m, BETA1); v = interpolate(g2, v, BETA2); root = sqrt(v);
        {ahead or "ahead = copy(m)"}; update = div(ahead, root); {update}; decay = mul(w, DECAY); update = add(update, decay);
        {schedule}; update = mul(update, lr); return update, m, v"""
    return "\n    ".join(["def train(w, g, m, v, lr):", *filter(None, map(str.strip, made.split(";")))])


NESTEROV = "ahead = interpolate(g, m, BETA1)"
CHANGES = {
    "no bias correction": program(),
    "Nesterov momentum (NAdam)": program(ahead=NESTEROV),
    "update where the gradient agrees (cautious)": program(
        update="agree = mul(update, g); agree = sign(agree); agree = max(agree, 0.0); update = mul(update, agree)"
    ),
    "tanh of the update": program(update="update = tanh(update)"),
    "Nesterov momentum, tanh of the update": program(ahead=NESTEROV, update="update = tanh(update)"),
    "update clipped to 1": program(update="update = min(update, 1.0); update = max(update, -1.0)"),
    "gradient clipped to norm 1": program(gradient="g = clip_by_global_norm(g, 1.0)"),
    "gradient of norm 1": program(gradient="n = global_norm(g); g = div(g, n)"),
    "gradient of norm 1, each tensor": program(gradient="n = norm(g); g = div(g, n)"),
    "surprise squared (AdaBelief)": program(gradient="surprise = sub(g, m)", squared="surprise"),
    "trust ratio of each tensor (LAMB)": program(
        update="n = norm(update); k = norm(w); k = div(k, n); update = mul(update, k)"
    ),
    "schedule squared": program(schedule="lr = mul(lr, lr)"),
    "root of the schedule": program(schedule="lr = sqrt(lr)"),
}


def family(text: str) -> list[Genome]:
    """The program with each of AdamW's settings, and the learning rate 1."""
    grid = SETTINGS["adamw"]
    return [
        parse(text.replace("BETA1", repr(b1)).replace("BETA2", repr(b2)).replace("DECAY", repr(decay)))
        for (b1, b2), decay in itertools.product(grid["betas"], grid["weight_decay"])
    ]


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="search")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    contenders = {name: (family(text), LEARNING_RATES) for name, text in CHANGES.items()}
    report: dict[str, Any] = {"machine": machine(), "suite": args.suite, "programs": CHANGES, "gates": {}}
    table = Table("gate", "AdamW with", "ahead of tuned AdamW", "95 % interval")
    for gate in usual_gates(args.suite):
        results = ranked(contenders, gate)
        report["gates"][gate.name] = [dataclasses.asdict(result) for result in results]
        for r in results:
            table.add_row(gate.name, r.contender, f"{r.ahead.iqm:+.4f}", f"[{r.ahead.low:+.4f}, {r.ahead.high:+.4f}]")
        table.add_section()
    Console(width=140).print(table)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
