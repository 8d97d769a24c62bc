"""Losses that the mutator finds, against tuned DPO, IPO, SLiC, LRML and cDPO, where nothing was tuned or selected.

    python benchmarks/discovery_loss.py --evaluations 2000 --seeds 5

Each seed is a search of its own, as `metaopt discover loss` makes; then comes `metaopt discover compare` of all of them, whose
pictures lie beside the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from metaopt.files import write_atomic
from metaopt_symbolic.genome import LOSS_SEEDS
from metaopt_symbolic.losses import comparison, report
from metaopt_symbolic.losses.candidate import LossValidator
from metaopt_symbolic.losses.judge import Judge, search_stages, selection_stage
from metaopt_symbolic.losses.mutator import LossMutator
from metaopt_symbolic.losses.selection import select
from metaopt_symbolic.proposals.loop import Loop, LoopConfig
from metaopt_symbolic.proposals.report import line

RESULTS = Path(__file__).parent / "results"


def searched(seed: int, evaluations: int, directory: Path) -> dict[str, Any]:
    """Search, select, and save what `metaopt discover loss` does."""
    judge, validator = Judge(search_stages()), LossValidator()
    config = LoopConfig("", ("mutator",), judge.describe(), LOSS_SEEDS, seed=seed)
    loop = Loop(config, judge, LossMutator(validator, seed), validator, directory)
    loop.run(evaluations=evaluations, on_round=lambda it: print(seed, line(it), flush=True))
    report.save(loop, select(loop.candidates, judge, selection_stage()))
    return dataclasses.asdict(loop.counts)


def main() -> None:
    """Search, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs", type=Path, default=None, help="directory of the searches; one that holds them goes on"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "discovery_loss.json")
    args = parser.parse_args()
    directory = args.runs or Path(tempfile.mkdtemp())
    runs = {f"found_{seed}": directory / f"found_{seed}" for seed in range(args.seeds)}
    counts = {name: searched(seed, args.evaluations, run) for seed, (name, run) in enumerate(runs.items())}
    facts, contestants = comparison.compare(runs)
    for run in runs.values():
        comparison.save(facts, contestants, run)
    write_atomic(args.out, json.dumps({"searches": counts, **facts}, indent=1) + "\n")
    write_atomic(args.out.with_suffix(".png"), comparison.picture(facts))
    write_atomic(args.out.with_name(f"{args.out.stem}_curves.png"), comparison.drawn(facts, contestants))
    Console(width=200).print(comparison.table(facts))


if __name__ == "__main__":
    main()
