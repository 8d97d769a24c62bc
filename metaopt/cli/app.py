"""The table of commands.

A command is a function in ``metaopt.cli.commands``, one module for each subject, and one line at the end of this file; or a
plugin's (`metaopt.hookspecs.metaopt_commands`).
Those modules import torch, and whatever imports torch, inside the function; so ``metaopt list`` and ``--help`` are
quick.
"""

from __future__ import annotations

from contextlib import suppress

import typer

from metaopt import registry
from metaopt.cli.commands import (
    baseline,
    bilevel,
    catalogue,
    demo,
    export,
    import_theta,
    meta_train,
    meta_tune,
    race,
    tune,
)
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
app.command("bilevel")(bilevel.bilevel)
app.command("race")(race.race)
app.command("tune")(tune.tune)
app.command("worker")(tune.worker)
app.command("baseline")(baseline.baseline)
app.command("export")(export.export)
app.command("import-theta")(import_theta.import_theta)
app.command("demo")(demo.demo)
app.add_typer(zoo, name="zoo")
for name in registry.specs("command"):
    with suppress(registry.RegistryError):  # metaopt plugins says which plugin cannot be loaded, and why
        command = registry.load("command", name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
