"""``metaopt import-theta``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Settings, parse_settings


def import_theta(
    file: Annotated[Path, typer.Argument(help="A checkpoint of another project.")],
    name: Annotated[
        str, typer.Option("--as", help="The learned optimizer that it belongs to (metaopt list importers).")
    ],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    settings: Settings = [],  # noqa: B006 - typer copies it
) -> None:
    """Make meta-parameters that another project trained usable here, as a directory for metaopt.optimizer.

    Example: [bold]metaopt import-theta theta.state --as celo --out runs/celo[/bold]
    """
    from rich.console import Console

    from metaopt import registry
    from metaopt.resolve import THETA_FILE, save_theta

    rule = registry.create("importer", name, path=file, **parse_settings(settings))
    written = save_theta(out / THETA_FILE, name, rule.learned, rule.theta)
    count = sum(value.numel() for value in rule.theta.values())
    Console().print(f"wrote {count} meta-parameters to [bold]{written}[/bold]; try: metaopt race {out} adamw")
