"""``metaopt tune`` against Optuna as it is mostly used: one trial after the other, an ordinary torch training loop in each.

    python benchmarks/tune.py [--tasks digits_mlp ...] [--optimizers adamw ...] [--trials 64] [--out FILE.json]

Both search the same space with the same sampler (TPE), as many trials of two seeds, the same initial parameters, batches and
looks at the valid split; sequential Optuna with its default pruner (median) and ``torch.optim``, ours with trials in lock-step.
The best five of each then train again from eight fresh seeds, by the same code, outside the clock; their winners are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt.evaluate.losses import split_losses
from metaopt.evaluate.tuning import VALID_EXAMPLES
from metaopt.random import sample_indices
from metaopt.tune import algorithms
from metaopt.tune.lockstep import LOOK_EXAMPLES
from metaopt.tune.studies import open_study
from metaopt.tune.tuning import Problem, Selection, TuneConfig, require_optuna, select, work
from metaopt.unroll import fresh_params

TASKS = ("digits_mlp", "mnist1d_mlp", "digits_autoencoder")
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


def timed(search: Callable[[Problem, optuna.Study], Any], config: TuneConfig) -> tuple[dict[str, Any], Selection]:
    problem = Problem(config)
    study = open_study(optuna.storages.InMemoryStorage(), "benchmark", problem.settings(), 1)
    study.enqueue_trial(problem.space.params(problem.rule.values()))
    wall, cpu = time.perf_counter(), time.process_time()
    search(problem, study)
    clock = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    found = select(problem, study, top=5, seeds=8)
    valid = found.winner.valid
    result = clock | {
        "values": found.winner.values,
        "valid": [valid.iqm, valid.low, valid.high],
        "test": found.test.iqm,
    }
    return result, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=list(SEARCHED), choices=list(SEARCHED))
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune.json")
    given = parser.parse_args()
    require_optuna()
    torch.set_num_threads(1)
    console, rows = Console(), []
    table = Table(title=f"{given.trials} trials of two seeds; valid loss of the winner from eight fresh seeds")
    for column in (
        "task",
        "optimizer",
        "s, sequential",
        "s, lock-step",
        "share of CPU time",
        "loss, sequential",
        "loss, lock-step",
    ):
        table.add_column(column)
    for task in given.tasks:
        for name in given.optimizers:
            make, searched = SEARCHED[name]
            config = TuneConfig(name, task, trials=given.trials, search=searched)
            one, _ = timed(lambda problem, study, make=make: sequential(problem, study, make), config)
            many, _ = timed(lambda problem, study: work(problem, study, batch=given.batch, first=True), config)
            share = many["cpu_seconds"] / one["cpu_seconds"]
            # losses of one task and the same seeds: the intervals overlap, or the lower one is ours
            same = many["valid"][1] <= one["valid"][2]
            rows.append(
                {"task": task, "optimizer": name, "sequential": one, "lockstep": many, "share": share, "same": same}
            )
            losses = [f"{r['valid'][0]:.4f} [{r['valid'][1]:.4f}, {r['valid'][2]:.4f}]" for r in (one, many)]
            table.add_row(
                task, name, f"{one['cpu_seconds']:.1f}", f"{many['cpu_seconds']:.1f}", f"{share:.2f}", *losses
            )
            console.print(rows[-1]["task"], name, f"share {share:.2f}", *losses)
    console.print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine(), "trials": given.trials, "rows": rows}, indent=1) + "\n")
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
