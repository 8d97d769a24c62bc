"""What tuned AdamW reaches on tasks that must be learnable: test accuracy of classifiers, loss of language models.

    python benchmarks/learning.py [--tasks digits_conv_wide digits_vit char_lm] [--seeds 5] [--out FILE.json]

The learning rate is tuned on the valid split exactly as in a race, then fresh seeds train for the task's horizon. Language
models are compared with the entropy of single tokens: the test loss of predicting every token by its frequency in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt import registry
from metaopt.evaluate.course import Course, seed_streams
from metaopt.evaluate.tuning import tune_lr
from metaopt.task import Task

GRID, ROUNDS, TUNE_SEEDS = 9, 2, 2
TASKS = ["digits_mlp", "digits_conv_wide", "digits_vit", "char_lm", "python_lm_2layer", "pydoc_lstm"]


def unigram_loss(task: Task) -> float:
    """Test loss of a model that knows the frequencies of single tokens."""
    train, test = (split.tensors["tokens"].flatten() for split in (task.train, task.test))
    counts = train.bincount(minlength=int(max(train.max(), test.max())) + 1).double() + 1
    return float(-(counts / counts.sum()).log()[test].mean())


@torch.no_grad()
def accuracy(task: Any, params: Any) -> torch.Tensor:
    """Test accuracy of every copy [K]."""
    test = task.test.take(torch.arange(len(task.test)))
    logits = torch.vmap(lambda p: (getattr(task, "logits", None) or task.predict)(p, test["input"]))(params)
    return (logits.argmax(-1) == test["label"]).double().mean(1)


def measure(name: str, seeds: int) -> dict[str, Any]:
    task, rule = registry.create("task", name), registry.create("optimizer", "adamw")
    course = Course.of(task, None, "cpu", "auto")
    tune_seeds, final_seeds = seed_streams(0, name, TUNE_SEEDS, seeds)
    tuning = tune_lr(course, rule, tune_seeds, GRID, ROUNDS)
    assert tuning is not None
    runs = course.start(rule, final_seeds)
    _, runs = course.train(rule, runs, course.steps, {"lr": tuning.lr})
    losses = course.losses(runs, task.test, None)
    found = {"task": name, "steps": course.steps, "lr": tuning.lr, "test_loss": losses.tolist()}
    if "label" in task.train.tensors:
        return found | {"accuracy": accuracy(task, runs.params).tolist()}
    return found | {"unigram_loss": unigram_loss(task)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    given = parser.parse_args()
    console, rows = Console(), []
    table = Table(title=f"tuned AdamW, {given.seeds} seeds: mean (lowest to highest)")
    for column in ("task", "steps", "lr", "test loss", "test accuracy", "loss of token frequencies"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name in given.tasks:
        row = measure(name, given.seeds)
        rows.append(row)
        shares = _spread([100 * a for a in row["accuracy"]], ".1f") + " %" if "accuracy" in row else ""
        unigram = f"{row['unigram_loss']:.3f}" if "unigram_loss" in row else ""
        table.add_row(name, str(row["steps"]), f"{row['lr']:.2g}", _spread(row["test_loss"], ".3f"), shares, unigram)
    console.print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    console.print(f"written: {given.out}")


def _spread(values: list[float], form: str) -> str:
    mean = sum(values) / len(values)
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
