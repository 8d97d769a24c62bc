"""The classic demonstrations of bilevel optimisation against their controls.

Each demo runs from several seeds (of data, initial parameters and outer start); what is reported is the interquartile mean and
its 95 % interval over seeds, of numbers on data that no level has seen. Runs that are done are not repeated: the file of
results holds them, and grows by ``--seeds``.

    python benchmarks/bilevel.py --out benchmarks/results/bilevel.json
    python benchmarks/bilevel.py --demos maml one_point --seeds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaopt import registry
from metaopt.evaluate.statistics import estimate
from metaopt.files import write_atomic
from metaopt.tune import Hypers, Inner
from metaopt.tune.combined import search
from metaopt.tune.outer import OuterConfig, OuterResult, run, solve
from metaopt.tune.problem import BilevelProblem

DECAYS = [10.0**power for power in torch.linspace(-5, 0, 21).tolist()]
PEAKS = [10.0**power for power in torch.linspace(-3.5, -1, 11).tolist()]
WARMUPS, FLOORS = (0.0, 0.1), (0.0, 0.1, 0.3, 0.5, 1.0)
SCHEDULED, STEPS = "python_lm_tiny", 100
MAML_STEPS = 70_000  # as many as the paper
TUNING_SEEDS, TEST_SEEDS = range(100, 104), range(200, 220)


def learned(problem: BilevelProblem, seed: int = 0, **settings: Any) -> OuterResult:
    """The problem solved as it usually is."""
    config: dict[str, Any] = {"method": "unroll", "steps": problem.outer_steps, "lr": problem.outer_lr, "seed": seed}
    return solve(problem, OuterConfig(**(config | settings)))


def made(name: str, **arguments: Any) -> Any:
    return registry.create("problem", name, **arguments)


def after(problem: Any, hypers: Hypers) -> dict[str, float]:
    """Test accuracy and loss of one run at given hypers, and the loss on the two parts that may be looked at."""
    with torch.no_grad():
        inner: Inner = problem.inner(0)
        params = inner.params(run(inner, hypers))
        losses = {part: float(problem.cross_entropy(params, hypers, part)) for part in ("outer", "holdout", "test")}
    return losses | {"accuracy": problem.accuracy(params, hypers)}


def hyper_cleaning(seed: int) -> dict[str, float]:
    """F1 of finding wrong labels, and test accuracy with controls, all refitted alike."""
    return learned(made("hyper_cleaning", seed=seed)).report


def scarce_cleaning(seed: int) -> dict[str, float]:
    """The same with half the clean examples: 50 for the outer level and 50 for the holdout."""
    return learned(made("hyper_cleaning", outer_examples=50, holdout_examples=50, seed=seed)).report


def layer_decay(seed: int) -> dict[str, float]:
    """Learned penalties of each tensor and each weight against the best of 21 for all, chosen by outer and holdout loss."""
    scalar = made("scalar_decay", seed=seed)
    tried = [after(scalar, {"all": torch.tensor(math.log(decay))}) for decay in DECAYS]
    best = min(tried, key=lambda row: row["outer"] + row["holdout"])
    found = {"best_scalar_accuracy": best["accuracy"], "best_scalar_loss": best["test"]}
    for per in ("layer", "parameter"):
        problem = made(f"{per}_decay", seed=seed)
        result = learned(problem)
        row = after(problem, result.hypers)
        found |= {f"{per}_accuracy": row["accuracy"], f"{per}_loss": row["test"], f"{per}_gap": result.gap or 0.0}
        found[f"{per}_loss_below_scalar"] = best["test"] - row["test"]
        found[f"{per}_accuracy_above_scalar"] = row["accuracy"] - best["accuracy"]
    return found


def augmentation(seed: int) -> dict[str, float]:
    """Learned distortions against none."""
    problem = made("learned_augmentation", seed=seed)
    without = {name: torch.full_like(value, -20.0) for name, value in problem.hypers(torch.Generator()).items()}
    return _against(problem, learned(problem), without)


def loss_weighting(seed: int) -> dict[str, float]:
    """Learned class weights and smoothing against none."""
    problem = made("loss_weighting", seed=seed)
    start = problem.hypers(torch.Generator())
    return _against(problem, learned(problem), start | {"smoothing_logit": torch.tensor(-20.0)})


def _against(problem: Any, result: OuterResult, without: Hypers) -> dict[str, float]:
    with_, control = after(problem, result.hypers), after(problem, without)
    found = {"accuracy": with_["accuracy"], "control_accuracy": control["accuracy"]}
    return found | {"accuracy_above_control": found["accuracy"] - found["control_accuracy"], "gap": result.gap or 0.0}


def sample_selection(seed: int) -> dict[str, float]:
    """The best fifth of the examples against a random one, and all."""
    return learned(made("sample_selection", seed=seed)).report


def distillation(seed: int) -> dict[str, float]:
    """Ten learned images against ten real ones, class means and all 800."""
    result = learned(made("data_distillation", seed=seed), seed)
    return result.report | {"gap": result.gap or 0.0, "last_gap": result.last_gap or 0.0}


def toy_cell(seed: int) -> dict[str, float]:
    """Rank of the found cell among all 64."""
    return learned(made("toy_cell", seed=seed), seed).report


def quadratic_schedule(seed: int) -> dict[str, float]:
    """Distance from Chebyshev's step sizes."""
    return learned(made("quadratic_schedule"), seed).report


def task_schedule(seed: int) -> dict[str, float]:
    """The best cosine and a schedule learned from there, on a language model: test loss of twenty fresh runs of each."""
    problem = made("task_schedule", task=SCHEDULED, steps=STEPS, judged=128, seed=1_000 * seed)

    def judged(rate: Callable[[int], Tensor], seeds: range, parts: tuple[str, ...]) -> list[float]:
        losses = []
        for one in seeds:
            inner = Inner.of_task(
                problem.workload, problem.rule, problem.seed + one, STEPS, hp=lambda _, t: {"lr": rate(t)}
            )
            with torch.no_grad():
                params = inner.params(run(inner, {}))
                losses.append(sum(float(problem.loss(params, part)) for part in parts) / len(parts))
        return losses

    def cosine(peak: float, warmup: float, floor: float) -> Callable[[float], Tensor]:
        first = warmup * STEPS

        def rate(t: float) -> Tensor:
            decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t - first) / (STEPS - first)))
            return torch.tensor(peak * ((t + 1) / (first + 1) if t < first else decay))

        return rate

    grid = list(itertools.product(PEAKS, WARMUPS, FLOORS))
    best = min(grid, key=lambda point: sum(judged(cosine(*point), TUNING_SEEDS, ("outer", "holdout"))))
    knots = torch.linspace(0, STEPS - 1, problem.knots).tolist()
    problem = dataclasses.replace(problem, initial=tuple(float(cosine(*best)(t)) for t in knots))
    # the gradient of one run is chaotic here: 8 pairs of runs around the schedule give one that is not
    around = {"pairs": 8, "sigma": 0.2, "copies": 8}
    result = learned(problem, method="es", method_options=around, steps=60, lr=0.05)
    ours = judged(lambda t: problem.rate(result.hypers["log_lr"], t), TEST_SEEDS, ("test",))
    theirs = judged(cosine(*best), TEST_SEEDS, ("test",))
    below = [b - a for a, b in zip(ours, theirs, strict=True)]
    mean = {"learned": ours, "cosine": theirs, "learned_below_cosine": below}
    averages = {name: sum(values) / len(values) for name, values in mean.items()}
    schedule = {f"lr_{i}": float(rate) for i, rate in enumerate(result.hypers["log_lr"].exp())}
    chosen = dict(zip(("cosine_peak", "cosine_warmup", "cosine_floor"), best, strict=True))
    return averages | schedule | chosen | {"step": result.step}


def maml(seed: int) -> dict[str, float]:
    """Sines from five points: error after 0, 1 and 10 steps; and of a network trained on all sines together."""
    problem = made("maml_sine", seed=seed)
    found = learned(problem, seed, steps=MAML_STEPS).report
    together = made("maml_sine", inner_lr=0.0, seed=seed)
    pretrained = learned(together, seed, steps=MAML_STEPS // 10).hypers
    return found | {"pretrained_1": float(problem.test_errors(pretrained, 1).mean())}


def one_point(seed: int) -> dict[str, float]:
    """Error on the curve after warm and cold starts, and what a fresh run makes of the warm one's point."""
    problem = made("one_point")
    warm, cold = (learned(problem, seed, start=start).report for start in ("warm", "cold"))
    return {
        "warm": warm["error"], "warm_hypers_cold": warm["fresh_error"], "cold": cold["error"], "cold_bound": cold["cold_bound"]
    }  # fmt: skip


def combined(seed: int) -> dict[str, float]:
    """60 ridge penalties: 200 trials of TPE; 20 of random search over the outer loop with hypergradients inside."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = made("ridge", dimensions=60, seed=seed)
    inner = problem.inner(0)

    def judged(hypers: Hypers) -> dict[str, float]:
        params = inner.params(inner.start(hypers))
        return {name: float(problem.error(params, name)) for name in ("outer", "holdout", "test")}

    def sampled(trial: optuna.Trial) -> float:
        logs = [trial.suggest_float(f"l{i}", -7.0, 3.0) for i in range(60)]
        row = judged({"log_penalty": torch.tensor(logs, dtype=torch.float64)})
        trial.set_user_attr("test", row["test"])
        return (row["outer"] + row["holdout"]) / 2

    began = time.process_time()
    alone = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    alone.optimize(sampled, 200)
    middle = time.process_time()

    def make(trial: optuna.Trial) -> tuple[BilevelProblem, OuterConfig]:
        lr = trial.suggest_float("lr", 0.01, 1.0, log=True)
        rule = trial.suggest_categorical("rule", ["adam", "rmsprop", "momentum"])
        return problem, OuterConfig(method="unroll", steps=60, rule=rule, lr=lr)

    with tempfile.TemporaryDirectory() as directory:
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed), pruner=optuna.pruners.MedianPruner(n_startup_trials=5)
        )
        search(make, study, 20, directory)
        test = study.best_trial.user_attrs["report"]["test_error"]
    shared = min((judged({"log_penalty": torch.full((60,), x, dtype=torch.float64)}) for x in torch.linspace(-7, 3, 41)),
                 key=lambda row: row["outer"] + row["holdout"])  # fmt: skip
    return {
        "shared_penalty": shared["test"], "tpe": alone.best_trial.user_attrs["test"], "combined": test,
        "combined_below_tpe": alone.best_trial.user_attrs["test"] - test,
        "tpe_seconds": middle - began, "combined_seconds": time.process_time() - middle,
    }  # fmt: skip


DEMOS: Mapping[str, Callable[[int], dict[str, float]]] = {
    demo.__name__: demo
    for demo in (
        hyper_cleaning, scarce_cleaning, layer_decay, augmentation, loss_weighting, sample_selection, distillation, toy_cell,
        quadratic_schedule, one_point, combined, task_schedule, maml,
    )
}  # fmt: skip


ROWS = [
    ("hyper_cleaning", "F1 of finding 300 wrong labels among 600", ("f1",)),
    ("hyper_cleaning", "test accuracy, refitted: kept examples; all; clean only; oracle",
     ("test_accuracy", "noisy", "clean_only", "oracle")),
    ("scarce_cleaning", "the same with 50 + 50 clean examples in place of 100 + 100",
     ("test_accuracy", "noisy", "clean_only", "oracle")),
    ("layer_decay", "test loss below that of the best common decay: one for each tensor; for each weight",
     ("layer_loss_below_scalar", "parameter_loss_below_scalar")),
    ("augmentation", "test accuracy: learned distortions; above none by", ("accuracy", "accuracy_above_control")),
    ("loss_weighting", "test accuracy, rare classes: learned weights and smoothing; above none by",
     ("accuracy", "accuracy_above_control")),
    ("sample_selection", "test accuracy: best fifth of the examples; a random fifth; all",
     ("test_accuracy", "random", "all")),
    ("distillation", "test accuracy: 10 learned images; 10 real ones; class means; 800 images",
     ("test_accuracy", "real_images", "class_means", "all_images")),
    ("quadratic_schedule", "excess loss over Chebyshev's steps, a ratio: learned; best constant",
     ("excess_ratio", "constant_ratio")),
    ("task_schedule", "test loss of a small language model: learned schedule; best cosine; difference",
     ("learned", "cosine", "learned_below_cosine")),
    ("maml", "sines from 5 points, squared error after 0, 1, 10 steps; diverged in 10 of 600; pretrained on all, 1 step",
     ("error_0", "error_1", "error_10", "diverged_10", "pretrained_1")),
    ("toy_cell", "rank of the found cell among 64", ("rank",)),
    ("one_point", "error: warm start; fresh run on its hypers; bound of all cold starts",
     ("warm", "warm_hypers_cold", "cold_bound")),
    ("combined", "60 ridge penalties, test error: gradient inside search; TPE alone; best common penalty",
     ("combined", "tpe", "shared_penalty")),
]  # fmt: skip
"""Of the page: demo, what is measured, numbers."""


def table(results: dict[str, Any]) -> str:
    """The page's table, of the demos that have results."""
    lines = ["| demo | measured | seeds | interquartile mean [95 % interval] |", "|---|---|---|---|"]
    for demo, what, names in ROWS:
        if demo in results["demos"]:
            rows = [results["demos"][demo]["summary"][name] for name in names]
            lines.append(f"| `{demo}` | {what} | {rows[0]['seeds']} | {'; '.join(map(_with_interval, rows))} |")
    return "\n".join(lines) + "\n"


def _with_interval(e: Mapping[str, float]) -> str:
    return f"{e['iqm']:.3g}" + (f" [{e['low']:.3g}, {e['high']:.3g}]" if "low" in e else "")


def summary(rows: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Interquartile mean of each number over the seeds, and of several seeds its 95 % interval."""
    first = next(iter(rows.values()))
    found = {name: estimate([[row[name] for row in rows.values()]]) for name in first}
    return {
        name: {"iqm": e.iqm, "seeds": e.count} | ({"low": e.low, "high": e.high} if e.count > 1 else {})
        for name, e in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", nargs="+", choices=list(DEMOS), default=list(DEMOS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bilevel.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"demos": {}}
    results["machine"] = machine()
    for name in args.demos:
        entry = results["demos"].setdefault(name, {"what": DEMOS[name].__doc__, "runs": {}})
        for seed in range(args.seeds):
            if str(seed) not in entry["runs"]:
                began = time.process_time()
                entry["runs"][str(seed)] = DEMOS[name](seed) | {"seconds": time.process_time() - began}
                entry["summary"] = summary(entry["runs"])
                write_atomic(args.out, json.dumps(results, indent=1) + "\n")
        shown = Table(title=f"{name}: {entry['what']}", title_justify="left")
        for column in ("", "interquartile mean [95 % interval]", "seeds"):
            shown.add_column(column)
        for what, e in entry["summary"].items():
            shown.add_row(what, _with_interval(e), str(e["seeds"]))
        console.print(shown)


if __name__ == "__main__":
    main()
