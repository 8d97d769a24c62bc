"""Losses that the mutator finds, against DPO, IPO, SLiC and LRML, where nothing was tuned or selected.

    python benchmarks/discovery_loss.py --evaluations 2000 --seeds 3

Each seed is a search of its own (`metaopt discover loss`): it is scored on some noise levels, its winner is selected on others,
where every contestant's scale of the log-probabilities (so beta) and learning rate are chosen too, and all are compared on a
third set: other noise levels, deeper policies and curved rewards, test split, ten seeds, 95 % intervals by Student's t,
differences paired by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaopt.files import write_atomic
from metaopt_symbolic.genome import LOSS_SEEDS, Genome, parse
from metaopt_symbolic.losses.candidate import LossValidator, objective
from metaopt_symbolic.losses.judge import (
    RATES,
    SCALES,
    Judge,
    Stage,
    margin_of,
    report_stage,
    search_stages,
    selection_stage,
)
from metaopt_symbolic.losses.loop import Loop, LoopConfig, select
from metaopt_symbolic.losses.mutator import Mutator
from metaopt_symbolic.losses.report import curves

RESULTS = Path(__file__).parent / "results"


def searched(seed: int, evaluations: int, directory: Path) -> tuple[Loop, Judge]:
    """A search of its own."""
    judge, validator = Judge(search_stages()), LossValidator()
    config = LoopConfig("", ("mutator",), judge.describe(), seed=seed)
    loop = Loop(config, judge, Mutator(validator, seed), validator, directory)
    loop.run(
        evaluations=evaluations, on_round=lambda it: print(seed, it.counts.evaluated, it.best.score.loss, flush=True)
    )
    return loop, judge


def compared(contestants: dict[str, Genome], judge: Judge, stage: Stage) -> dict[str, Any]:
    """Losses on the test split, at the setting that is best on the tasks of the selection."""
    objectives = [objective(genome) for genome in contestants.values()]
    tuned = judge.scores_on(selection_stage(), objectives)
    losses = judge.losses(stage, objectives, split="test")
    own = {
        name: of[:, SCALES.index(score.scale), RATES.index(score.rate)].numpy()
        for name, of, score in zip(contestants, losses, tuned, strict=True)
    }
    settings = {name: [score.scale, score.rate] for name, score in zip(contestants, tuned, strict=True)}
    names = [regime.name for regime in stage.regimes]
    return {
        name: {
            "program": contestants[name].text(),
            "setting": settings[name],
            "loss": _mean(of.mean(0)),
            "by_task": {task: _mean(row) for task, row in zip(names, of, strict=True)},
            "behind": {other: _mean((of - than).mean(0)) for other, than in own.items() if other != name},
        }
        for name, of in own.items()
    }


def _mean(values: np.ndarray) -> list[float]:
    """Mean and 95 % interval."""
    mean, margin = float(values.mean()), margin_of(values)
    return [mean, mean - margin, mean + margin]


def picture(found: dict[str, Any]) -> bytes:
    """Contestants by task, with intervals."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for k, (name, of) in enumerate(found.items()):
        rows = np.array([*of["by_task"].values(), of["loss"]])
        at = np.arange(len(rows)) + 0.8 * k / len(found) - 0.4
        axes.errorbar(at, rows[:, 0], yerr=(rows[:, 2] - rows[:, 0]), fmt="o", markersize=3, label=name)
    axes.set_xticks(range(len(rows)), [*of["by_task"], "mean"])
    axes.set(ylabel="loss of the policy (1: reference, 0: best)")
    axes.legend(ncols=3, fontsize="small")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120, metadata={"Software": None})
    return target.getvalue()


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
    runs = args.runs or Path(tempfile.mkdtemp())
    contestants = {name: parse(text) for name, text in LOSS_SEEDS.items()}
    searches = []
    for seed in range(args.seeds):
        loop, judge = searched(seed, args.evaluations, runs / str(seed))
        selected = select(loop.candidates, judge, selection_stage())
        contestants[f"found_{seed}"] = selected.candidate.genome
        searches.append({"counts": dataclasses.asdict(loop.counts), "winner": selected.candidate.source})
    found = compared(contestants, judge, report_stage())
    facts = {
        "evaluations": args.evaluations, "torch": torch.__version__, "searches": searches, "settings": [SCALES, RATES],
        "report": dataclasses.asdict(report_stage()), "contestants": found,
    }  # fmt: skip
    write_atomic(args.out, json.dumps(facts, indent=1) + "\n")
    write_atomic(args.out.with_suffix(".png"), picture(found))
    write_atomic(args.out.with_name(f"{args.out.stem}_curves.png"), curves(contestants))
    for name, of in found.items():
        print(name, of["setting"], *(f"{value:.4f}" for value in of["loss"]), of["behind"].get("dpo"))


if __name__ == "__main__":
    main()
