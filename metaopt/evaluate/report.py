"""A finished race as a table, a picture and a complete JSON file."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from metaopt.evaluate.curves import figure_png
from metaopt.evaluate.race import Entry, RaceResult
from metaopt.evaluate.statistics import Estimate
from metaopt.files import write_atomic

FORMAT = 1
TASKS_ON_A_PAGE = 3


def save(result: RaceResult, directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``race.json``, ``curves.png`` and ``race.txt`` into ``directory``, each whole or not at all.

    Returns:
        ``{"json": path, "curves": path, "table": path}``.
    """
    folder = Path(directory)
    text = json.dumps(as_json(result), indent=1, allow_nan=False, sort_keys=True)
    columns = max(len(result.ranking), min(len(result.tasks), TASKS_ON_A_PAGE) + 1)
    page = Console(file=io.StringIO(), width=60 + 30 * columns)
    page.print(table(result))
    if len(result.tasks) > TASKS_ON_A_PAGE:
        page.print(table_of_tasks(result))
    return {
        "json": write_atomic(folder / "race.json", _NUMBERS.sub(_on_one_line, text) + "\n"),
        "curves": write_atomic(folder / "curves.png", figure_png(result)),
        "table": write_atomic(folder / "race.txt", page.file.getvalue()),  # type: ignore[attr-defined]
    }


_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")  # a list of numbers over several lines; no string holds a raw line break


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers.group().split()).replace("[ ", "[").replace(" ]", "]")


def as_json(result: RaceResult) -> dict[str, Any]:
    """Everything in the result; NaN and infinities become None. Only ``wall_clock`` differs between equal races."""
    return {
        "format": FORMAT,
        "versions": {
            "metaopt": _version("torch-metaopt"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "protocol": result.protocol,
        "contenders": plain(result.contenders),
        "tasks": result.tasks,
        "ranking": result.ranking,
        "aggregate": {name: plain(dataclasses.asdict(value)) for name, value in result.aggregate.items()},
        "entries": {
            name: {task: plain(dataclasses.asdict(entry)) for task, entry in row.items()}
            for name, row in result.entries.items()
        },
        "against_adamw": plain(result.against_adamw),
        "wall_clock": {"seconds": {name: round(value, 3) for name, value in result.seconds.items()}},
    }


def table(result: RaceResult) -> Table:
    """One row per contender, best first; more tasks than a page is wide are left to `table_of_tasks`."""
    tasks = result.tasks if len(result.tasks) <= TASKS_ON_A_PAGE else []
    seeds, tuning_runs = result.protocol["seeds"], result.protocol["tuning_runs"]
    grid = Table(
        title="Race: test loss after training, interquartile mean [95 % interval]"
        + ("" if tasks else f", over {len(result.tasks)} tasks"),
        caption=(
            f"{seeds} seeds per task, {tuning_runs} tuning runs per contender and task; ★ best; "
            "score: normalised, over all tasks, lower is better; ! learning rate at an end of the search"
            + (
                "; speedup: steps that archived tuned AdamW needs for the same loss / steps made"
                if result.against_adamw
                else ""
            )
        ),
        caption_justify="left",
        title_justify="left",
        show_lines=len(tasks) > 1,
    )
    grid.add_column("contender", no_wrap=True)
    grid.add_column("score", justify="right")
    if result.against_adamw:
        grid.add_column("speedup", justify="right")
    for task in tasks:
        grid.add_column(task, justify="right")
    grid.add_column("diverged", justify="right")
    total = seeds * len(result.tasks)
    for place, name in enumerate(result.ranking):
        failed = result.diverged(name)
        grid.add_row(
            Text(name, style="bold" if place == 0 else ""),
            _cell(result.aggregate[name], place == 0),
            *([f"{result.against_adamw[name]['speedup']:.2f}"] if result.against_adamw else []),
            *(_task_cell(result.entries[name][task], _wins(result, name, task)) for task in tasks),
            Text(f"{failed} of {total}", style="bold red" if failed else "dim"),
        )
    return grid


def table_of_tasks(result: RaceResult) -> Table:
    """One row per task, one column per contender, best first."""
    grid = Table(title="Test loss and learning rate, task by task", title_justify="left", show_lines=True)
    grid.add_column("task", no_wrap=True)
    for name in result.ranking:
        grid.add_column(name, justify="right")
    for task in result.tasks:
        cells = (_task_cell(result.entries[name][task], _wins(result, name, task)) for name in result.ranking)
        grid.add_row(task, *cells)
    return grid


def _wins(result: RaceResult, name: str, task: str) -> bool:
    return name == result.best(task) and math.isfinite(result.entries[name][task].loss.iqm)


def _cell(value: Estimate, best: bool) -> Text:
    text = Text(_number(value.iqm) + (" ★" if best else ""), style="bold green" if best else "")
    if not math.isnan(value.low):
        text.append(f"\n[{_number(value.low)}, {_number(value.high)}]", style="not bold dim")
    return text


def _task_cell(entry: Entry, best: bool) -> Text:
    text = _cell(entry.loss, best)
    if entry.tuning is None:
        text.append("\nuntuned" if entry.lr is None else f"\nlr {entry.lr:.2g} untuned", style="not bold cyan")
    else:
        text.append(f"\nlr {entry.tuning.lr:.2g}{' !' if entry.tuning.edge else ''}", style="not bold cyan")
    if entry.diverged:
        text.append(f"\n{entry.diverged} of {len(entry.seeds)} diverged", style="not bold red")
    return text


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.4g}"


def plain(value: Any) -> Any:
    """Nested containers of numbers with non-finite ones as None; floats keep 9 digits, what a float32 needs."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value if isinstance(value, (int, str)) or value is None else repr(value)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
