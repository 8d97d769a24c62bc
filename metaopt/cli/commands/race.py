"""``metaopt race``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Backend, Device, Seed, check_device


def race(
    contenders: Annotated[
        list[str],
        typer.Argument(
            metavar="OPT...",
            help="Registered names, FILE.py:RULE of your own, zoo:NAME, or directories of meta-training runs; LABEL=REFERENCE "
            "gives one a name.",
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Comma-separated tasks (metaopt list tasks), suite:NAME for a suite.")
    ] = "digits_mlp",
    seeds: Annotated[int, typer.Option(help="Final runs per contender and task.")] = 5,
    steps: Annotated[int | None, typer.Option(help="Length of every run; default: each task's horizon.")] = None,
    grid: Annotated[int, typer.Option(help="Learning rates tried first; 0: no tuning.")] = 9,
    tune_seeds: Annotated[int, typer.Option(help="Runs per learning rate.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the JSON, the picture and the table; default: a new one in runs/."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    backend: Backend = "auto",
) -> None:
    """Race optimizers: learning rates tuned with one budget for all, then fresh seeds, scored on the test split.

    Example: [bold]metaopt race adamw lion runs/lopt my_rule.py:MyRule --tasks digits_conv,char_lm --seeds 5[/bold]
    """
    from rich.console import Console

    from metaopt.evaluate import race as run
    from metaopt.evaluate import save, table

    named = {}
    for item in contenders:
        label, equals, reference = item.rpartition("=")
        named[label if equals else _label(item)] = reference
    if len(named) < len(contenders):
        raise ValueError(f"contenders must have different names, got {contenders}; give one a name: mine=FILE.py:RULE")
    result = run(
        named, [name for name in tasks.split(",") if name], seeds=seeds, steps=steps, grid=grid, tune_seeds=tune_seeds,
        seed=seed, device=check_device(device), backend=backend,
    )  # fmt: skip
    written = save(result, out or _free(Path("runs/race")))
    console = Console()
    console.print(table(result))
    console.print("written: " + ", ".join(str(path) for path in written.values()))


def _label(reference: str) -> str:
    """A short name: the rule of ``file.py:Rule``, the last part of a path, or the name itself."""
    return reference.rpartition(":")[2] if ":" in reference else Path(reference).name.removesuffix(".safetensors")


def _free(path: Path) -> Path:
    """``path``, or with the first number that makes it new: an earlier race is never overwritten unasked."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())
