"""``metaopt tune`` against Optuna as it is mostly used: one trial after the other, an ordinary torch training loop in each.

    python benchmarks/tune.py [--tasks digits_mlp ...] [--optimizers adamw ...] [--seeds 5] [--out FILE.json]

Both search the same space with the same sampler (TPE), as many trials of two training runs, the same initial parameters and
batches, and looks at the valid split; sequential Optuna with its default pruner (median) and ``torch.optim``, ours in
lock-step. The best five of each then train again from eight fresh seeds, by the same code, outside the clock; their winners are
compared. The two take turns in going first. Kernels are built before, as they are once per machine; how long that took is
recorded too. Searches that are done are not repeated: the file of results grows by ``--seeds``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from report import machine

from metaopt.evaluate.losses import split_losses
from metaopt.evaluate.statistics import estimate
from metaopt.evaluate.tuning import VALID_EXAMPLES
from metaopt.files import write_atomic
from metaopt.random import sample_indices
from metaopt.tune import algorithms
from metaopt.tune.lockstep import LOOK_EXAMPLES
from metaopt.tune.studies import open_study
from metaopt.tune.tuning import Problem, TuneConfig, require_optuna, select, work
from metaopt.unroll import fresh_params

TASKS = ("digits_mlp", "mnist1d_mlp", "digits_autoencoder")
TRIALS, BATCH, STEPS = 64, 8, 200
SEARCHED = {
    "adamw": (torch.optim.AdamW, ("lr", "beta1", "weight_decay")),
    "adam": (torch.optim.Adam, ("lr", "beta1", "eps")),
    "rmsprop": (torch.optim.RMSprop, ("lr", "alpha", "weight_decay")),
    "sgd": (torch.optim.SGD, ("lr", "momentum", "weight_decay")),
}


def sequential(problem: Problem, study: optuna.Study, make: Callable[..., torch.optim.Optimizer]) -> None:
    """Optuna's own loop; the training loop that a user writes."""
    task, steps = problem.course.task, problem.course.steps
    study.sampler = algorithms.sampler("tpe", problem.config.seed)
    study.pruner = optuna.pruners.MedianPruner()

    def objective(trial: optuna.Trial) -> float:
        values = problem.space.suggest(trial)
        runs = []
        for seed in problem.seeds:
            params = {name: p[0].requires_grad_() for name, p in fresh_params([task], torch.tensor([seed])).items()}
            runs.append((seed, params, make(params.values(), **values)))
        score = math.inf
        for unit in range(1, problem.units + 1):
            losses = []
            for seed, params, optimizer in runs:
                length = steps // problem.units
                at = torch.arange((unit - 1) * length, unit * length)
                for row in sample_indices(torch.tensor(seed).expand(length), at, task.batch_size, len(task.train)):
                    loss, _ = task.training_loss(params, {}, task.train.take(row) | dict(task.config))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                copies = {name: p.detach()[None] for name, p in params.items()}
                most = VALID_EXAMPLES if unit == problem.units else LOOK_EXAMPLES
                losses.append(split_losses(task, copies, task.valid, max_examples=most)[0])
            score = float(task.normalize(torch.stack(losses)).mean())
            if not all(map(math.isfinite, losses)):
                raise optuna.TrialPruned
            if unit < problem.units:
                trial.report(score, unit)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return score

    study.optimize(objective, n_trials=problem.config.trials)


def timed(search: Callable[[Problem, optuna.Study], Any], config: TuneConfig) -> dict[str, Any]:
    """A search with its clocks, and what its winner is worth."""
    problem = Problem(config)
    study = open_study(optuna.storages.InMemoryStorage(), "benchmark", problem.settings(), 1)
    study.enqueue_trial(problem.space.params(problem.rule.values()))
    wall, cpu = time.perf_counter(), time.process_time()
    search(problem, study)
    clock = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    found = select(problem, study, top=5, seeds=8)
    return clock | {"values": found.winner.values, "valid": found.winner.valid.iqm, "test": found.test.iqm}


def both(task: str, optimizer: str, seed: int) -> dict[str, Any]:
    """One search each way."""
    make, searched = SEARCHED[optimizer]
    config = TuneConfig(optimizer, task, trials=TRIALS, search=searched, steps=STEPS, seed=seed)

    def lockstep(problem: Problem, study: optuna.Study) -> None:
        work(problem, study, batch=BATCH, first=True)

    built = time.perf_counter()
    timed(lockstep, dataclasses.replace(config, trials=1))
    built = time.perf_counter() - built
    ways: dict[str, Callable[[Problem, optuna.Study], None]] = {
        "sequential": lambda problem, study: sequential(problem, study, make),
        "lockstep": lockstep,
    }
    order = sorted(ways, reverse=bool(seed % 2))
    return {"first_trial_seconds": built} | {way: timed(ways[way], config) for way in order}


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the searches of one task and optimizer: medians of the clocks' ratios, difference of the optima with its interval."""

    def ratio(clock: str) -> float:
        return statistics.median(run["lockstep"][clock] / run["sequential"][clock] for run in runs.values())

    medians = {
        f"{way}_{key}": statistics.median(run[way][key] for run in runs.values())
        for way in ("sequential", "lockstep")
        for key in ("seconds", "cpu_seconds", "valid")
    }
    above = estimate([[run["lockstep"]["valid"] - run["sequential"]["valid"] for run in runs.values()]])
    difference = {"above": above.iqm, "above_low": above.low, "above_high": above.high}
    return medians | difference | {"ratio": ratio("seconds"), "cpu_ratio": ratio("cpu_seconds"), "seeds": above.count}


def table(results: dict[str, Any]) -> str:
    """The table of docs/tune.md."""
    lines = [
        "| task | optimizer | sequential, CPU s | lock-step, CPU s | of the CPU time | of the wall time "
        "| loss, sequential | lock-step above it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, cells in results["searches"].items():
        for optimizer, cell in cells.items():
            e = cell["summary"]
            lines.append(
                f"| {task} | {optimizer} | {e['sequential_cpu_seconds']:.1f} | {e['lockstep_cpu_seconds']:.2f} "
                f"| {e['cpu_ratio']:.3f} | {e['ratio']:.3f} | {e['sequential_valid']:.4f} "
                f"| {e['above']:+.4f} [{e['above_low']:+.4f}, {e['above_high']:+.4f}] |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=list(SEARCHED), choices=list(SEARCHED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune.json")
    given = parser.parse_args()
    require_optuna()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"searches": {}}
    results |= {"machine": machine(), "trials": TRIALS, "batch": BATCH, "steps": STEPS}
    for seed in range(given.seeds):
        for task in given.tasks:
            for optimizer in given.optimizers:
                cell = results["searches"].setdefault(task, {}).setdefault(optimizer, {"runs": {}})
                if str(seed) not in cell["runs"]:
                    cell["runs"][str(seed)] = both(task, optimizer, seed)
                    cell["summary"] = summary(cell["runs"])
                    write_atomic(given.out, json.dumps(results, indent=1) + "\n")
                    print(task, optimizer, seed, {name: round(value, 4) for name, value in cell["summary"].items()})
    print(table(results))


if __name__ == "__main__":
    main()
