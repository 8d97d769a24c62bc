"""``metaopt baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Device, check_device


def baseline(
    tasks: Annotated[
        str, typer.Option(help="Comma-separated tasks, suite:NAME for a suite; default: every named task.")
    ] = "",
    rule: Annotated[str, typer.Option(help="What to tune (metaopt list optimizers).")] = "adamw",
    out: Annotated[Path, typer.Option(help="The archive, JSON lines; tasks that it holds are not run again.")] = Path(
        "runs/adamw.jsonl"
    ),
    device: Device = "cpu",
) -> None:
    """Archive tuned AdamW's curve on every task: what "steps that AdamW needs for the same loss" is read from.

    Example: [bold]metaopt baseline --tasks suite:fast --out runs/adamw.jsonl[/bold]
    """
    from rich.console import Console

    from metaopt.evaluate.baseline import build, read
    from metaopt.suite import listed, suites

    names = listed(tasks.split(",")) if tasks else [name for suite in suites().values() for name in suite]
    build(names, out, rule=rule, device=check_device(device))
    Console().print(f"{len(read(out))} tasks in {out}")
