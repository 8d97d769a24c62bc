"""``metaopt zoo``: published rules and losses, their cards, and whether they still do what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.catalogue import AsJson

zoo = typer.Typer(help="Published rules and losses: list, show, verify, add.", rich_markup_mode="rich")

Name = Annotated[str, typer.Argument(help="An entry (metaopt zoo list).")]


@zoo.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """Published rules and losses: list, show, verify, add."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@zoo.command("list")
def list_entries(as_json: AsJson = False) -> None:
    """List the entries of all installed zoos; each is used as zoo:NAME wherever a rule, or an objective, is wanted.

    Example: [bold]metaopt zoo list[/bold]
    """
    from metaopt.cli.commands.catalogue import print_specs

    columns = ("name", "summary", "holds", "learned_optimizer", "tasks", "license", "plugin")
    print_specs("zoo_rule", columns, as_json)


@zoo.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Print the card of an entry: how it was made, its scores with intervals, its limits.

    Example: [bold]metaopt zoo show NAME[/bold]
    """
    from metaopt.zoo import CARD_FILE, read_card, render

    directory = _directory(name)
    typer.echo((directory / CARD_FILE).read_text() if as_json else render(read_card(directory)), nl=False)


@zoo.command("verify")
def verify(name: Annotated[str | None, typer.Argument(help="An entry; default: all of them.")] = None) -> None:
    """Check that entries are what their cards say, that cards are complete, and that training repeats the recorded losses.

    Example: [bold]metaopt zoo verify[/bold]
    """
    from metaopt import registry
    from metaopt.zoo.entry import verify as verify_entry

    names = [name] if name else list(registry.specs("zoo_rule"))
    if not names:
        typer.echo("no entries; metaopt zoo add makes one")
    failed = []
    for entry in names:
        try:
            difference = verify_entry(_directory(entry))
        except ValueError as error:
            failed.append(entry)
            typer.echo(f"{entry}: {error}")
        else:
            typer.echo(f"{entry}: good; recorded losses repeat to {difference:.0e}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} entries failed: {', '.join(failed)}")


@zoo.command("add")
def add(
    run: Annotated[
        Path, typer.Argument(help="Directory of a finished meta-training run, or of a search and its champion.")
    ],
    name: Annotated[str, typer.Argument(help="Of the entry: lower-case letters, digits, underscores.")],
    license: Annotated[
        str, typer.Option("--license", "--licence", help="Of what is published, for example Apache-2.0.")
    ],
    summary: Annotated[str, typer.Option(help="One line.")],
    limits: Annotated[str, typer.Option(help="What it was not tried on, and where it fails.")],
    race: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a race that the run, or RUN/champion.py:Champion, took part in; none of a loss, which "
            "metaopt discover compare compares."
        ),
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Directory of entries: a package whose plugin lists them.")] = Path(
        "zoo/metaopt_zoo"
    ),
    task: Annotated[
        str | None,
        typer.Option(
            help="A quick task, whose first losses are recorded; default: digits_mlp, of a loss preference_noisy_slic_linear."
        ),
    ] = None,
) -> None:
    """Make an entry of a meta-training run, a simplified champion or a compared loss, with its card, whole or not at all.

    Example: [bold]metaopt zoo add runs/lopt small_lopt --race runs/race --license Apache-2.0
    --summary "..." --limits "..."[/bold]
    """
    from metaopt.zoo.make import add as make

    made = make(run, name, to, race=race, license=license, summary=summary, limits=limits, golden_task=task)
    typer.echo(f"wrote {made}; try: metaopt zoo show {name}")


def _directory(name: str) -> Path:
    from metaopt import registry

    return Path(registry.get("zoo_rule", name.removeprefix("zoo:")).defaults["directory"])
