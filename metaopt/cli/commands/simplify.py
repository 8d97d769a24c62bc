"""``metaopt simplify``: the champion of a search as its ten lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simplify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a search.")],
    tolerance: Annotated[float, typer.Option(help="Loss of fitness that a shorter program may cost.", min=0)] = 0.005,
    storage: Annotated[str | None, typer.Option(help="As for discover rule.")] = None,
) -> None:
    """Shorten the champion of a search, and write it as the Python file of a rule.

    Example: [bold]metaopt simplify runs/found[/bold]
    """
    from rich.console import Console

    from metaopt_symbolic.champion import write_champion

    console = Console(stderr=True)
    result, path = write_champion(directory, tolerance=tolerance, storage=storage)
    for line in result.log:
        console.print(line, highlight=False)
    console.print(result.genome.text(), highlight=False)
    console.print(f"written: {path}")
    console.print(f"next: metaopt race {path}:Champion adamw lion --tasks suite:fast", soft_wrap=True)
    console.print(f"      metaopt export {path}:Champion --to my_optimizer.py --class MyOptimizer", soft_wrap=True)
