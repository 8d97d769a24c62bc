"""``metaopt distill``: a learned objective or optimizer as a closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Seed, Settings, parse_settings

MOST_KNOWN = 50
"""Children per structure that is fitted, after which a search ends too."""


def distill(
    target: Annotated[
        str,
        typer.Argument(
            help="An objective (metaopt list objectives, or FILE.py:NAME), or an optimizer: registered, FILE.py:NAME, trained "
            "meta-parameters or zoo:NAME."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of what is written.", file_okay=False)] = Path("runs/distilled"),
    budget: Annotated[
        str,
        typer.Option(help="Structures whose numbers are fitted (5000) or time (2m), for each piece of the formula."),
    ] = "5000",
    tolerance: Annotated[
        float,
        typer.Option(help="Mean error that counts as none, in units of the target's mean size.", min=0.0001, max=1),
    ] = 0.02,
    tasks: Annotated[
        str, typer.Option(help="On what an optimizer is watched: suites of a search, tasks, with commas between them.")
    ] = "search",
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006 - typer copies it
) -> None:
    """Find a closed form of a learned objective or optimizer, and verify it where the fit has not looked.

    Discovered policy optimisation is what its authors read off the network of LPO so. Exits with 0 whatever the verdict is.
    Where it was stopped (Ctrl-C, twice at once), the same command goes on.

    Example: [bold]metaopt distill discovered_policy --out runs/drift[/bold]
    """
    from rich.console import Console

    from metaopt_symbolic.distill.distil import checkpoints, distil, resolve
    from metaopt_symbolic.search import Budget

    console = Console(stderr=True)
    given = Budget.of(budget)
    found = resolve(target, seed, **parse_settings(settings))
    # children of known structures cost little, but a search may stand still
    most = given.children and MOST_KNOWN * given.children
    spent = Budget(seconds=given.seconds, children=most, unique=given.children)
    try:
        result = distil(
            found, target, spent, tolerance=tolerance, tasks=tasks, seed=seed, directory=out, console=console
        )
    except KeyboardInterrupt:
        if checkpoints(out):
            console.print(f"stopped; what was searched is saved in {out}, and the same command goes on", soft_wrap=True)
        raise
    written = result.save(out)
    for file in checkpoints(out):
        file.unlink()
    console.print(result.verdict.text, highlight=False, soft_wrap=True)
    console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)
