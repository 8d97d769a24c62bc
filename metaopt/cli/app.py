"""The table of commands.

A command is a function in ``metaopt.cli.commands``, one module for each subject, and one line at the end of this file.
Those modules import torch, and whatever imports torch, inside the function; so ``metaopt list`` and ``--help`` are
quick.
"""

from __future__ import annotations

import typer

from metaopt.cli.commands import baseline, catalogue, demo, export, import_theta, meta_train, meta_tune, race
from metaopt.cli.commands.discover import discover
from metaopt.cli.commands.simplify import simplify
from metaopt.cli.commands.zoo import zoo

app = typer.Typer(
    name="metaopt",
    help="Write an optimizer once; meta-train it, race it, export it.",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Write an optimizer once; meta-train it, race it, export it."""


app.command("list")(catalogue.list_kind)
app.command("plugins")(catalogue.list_plugins)
app.command("meta-train")(meta_train.meta_train)
app.command("meta-tune")(meta_tune.meta_tune)
app.command("race")(race.race)
app.command("baseline")(baseline.baseline)
app.command("export")(export.export)
app.command("import-theta")(import_theta.import_theta)
app.command("demo")(demo.demo)
app.command("simplify")(simplify)
app.add_typer(discover, name="discover")
app.add_typer(zoo, name="zoo")
