"""``metaopt export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Settings, parse_settings


def export(
    name: Annotated[
        str,
        typer.Argument(
            help="A registered name, FILE.py:RULE, zoo:NAME, a directory of a meta-training run, or best.json."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="The Python file to write.")],
    class_name: Annotated[
        str | None, typer.Option("--class", help="Name of the class; default from NAME, or the rule's.")
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer copies it
    exporter: Annotated[str, typer.Option(help="How to write it (metaopt list exporters).")] = "torch",
) -> None:
    """Write an optimizer as one Python file that needs only torch.

    Example: [bold]metaopt export lion --to lion.py --set weight_decay=0.1[/bold]
    """
    from rich.console import Console

    from metaopt import registry
    from metaopt.resolve import resolve_rule

    rule = resolve_rule(name, **parse_settings(settings))
    label = class_name or (name.rpartition(":")[2] if ":" in name else Path(name).name.removesuffix(".safetensors"))
    if class_name is None and label.endswith(".json"):  # settings of metaopt tune
        label = type(rule).__name__
    written = registry.load("exporter", exporter)(rule, label, to)
    Console().print(f"wrote [bold]{written}[/bold]; it imports torch alone")
