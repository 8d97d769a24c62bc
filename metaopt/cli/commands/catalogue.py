"""``metaopt list`` and ``metaopt plugins``: what there is, and where it came from."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from metaopt import registry
from metaopt.hookspecs import Spec

KIND_WORDS = {
    "optimizers": "optimizer",
    "learned-optimizers": "learned_optimizer",
    "tasks": "task",
    "problems": "problem",
    "data-sources": "data_source",
    "objectives": "objective",
    "estimators": "estimator",
    "hypergradients": "hypergradient",
    "truncations": "truncation",
    "curriculums": "curriculum",
    "backends": "unroll_backend",
    "kernels": "kernel",
    "proposers": "proposer",
    "commands": "command",
    "importers": "importer",
    "exporters": "exporter",
    "zoo-rules": "zoo_rule",
}
"""What users type -> kind; the singular does as well."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def list_kind(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(KIND_WORDS)}.")],
    as_json: AsJson = False,
) -> None:
    """List what the installed plugins offer.

    Example: [bold]metaopt list optimizers[/bold]
    """
    kind = _kind(kind)
    last = {
        "task": ("suite", "parameters", "license"),
        "zoo_rule": ("license",),
        "proposer": ("tags", "paper"),  # what each proposes
    }.get(kind, ("paper",))
    print_specs(kind, ("name", "summary", *last, "plugin"), as_json)


def print_specs(kind: str, columns: tuple[str, ...], as_json: bool) -> None:
    """What the installed plugins offer of one kind, as a table of ``columns`` or as JSON of everything; problems on stderr."""
    found = registry.default()
    rows = [_row(found, kind, spec) for spec in found.specs(kind).values()]
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            row["paper"] = row["paper"].split(", http")[0]
            row["tags"] = ", ".join(row["tags"])
        _print_table(columns, rows)
    _warn(found)


_TASK_FACTS = ("family", "suite", "data", "license", "parameters", "bytes", "ms_per_step", "content")


def _row(found: registry.Registry, kind: str, spec: Spec) -> dict[str, Any]:
    """What a spec says, its facts among it; a task says under what licence its data are."""
    row = dataclasses.asdict(spec)
    row |= {"kind": kind, "plugin": found.owner(kind, spec.name)} | row.pop("facts")
    if kind == "task":
        row = dict.fromkeys(_TASK_FACTS) | row
        known = found.specs("data_source")
        sources = [known[name] for name in (row["data"] or "").split(", ") if name in known]
        licenses = "; ".join(dict.fromkeys(source.facts.get("license", "unknown") for source in sources))
        row["license"] = licenses or ("none needed: generated" if row["family"] else None)
    return row


def list_plugins(as_json: AsJson = False) -> None:
    """Show every plugin: its package, where it is, what it offers, and what failed to load and why.

    Example: [bold]metaopt plugins --json[/bold]
    """
    found = registry.default()
    rows = [dataclasses.asdict(report) for report in found.plugins()]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        row["package"] = f"{row['distribution']} {row['version']}".strip()
        row["offers"] = ", ".join(_count(kind, count) for kind, count in row["counts"].items())
    _print_table(("name", "package", "offers", "where"), rows)
    _warn(found)


def _kind(word: str) -> str:
    plural = word.lower().replace("_", "-").removesuffix("s") + "s"
    plural = plural.removeprefix("unroll-")
    if plural not in KIND_WORDS:
        close = difflib.get_close_matches(plural, KIND_WORDS, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(KIND_WORDS)}"
        raise ValueError(f"there is nothing of kind {word!r} to list; {advice}")
    return KIND_WORDS[plural]


def _count(kind: str, count: int) -> str:
    return f"{count} {kind.replace('_', ' ')}{'' if count == 1 else 's'}"


def _print_json(rows: list[dict[str, Any]]) -> None:
    typer.echo(json.dumps(rows, indent=2, default=str))


def _print_table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    console = Console(markup=False, highlight=False)  # other people's summaries may hold square brackets
    if not console.is_terminal:
        console.width = 1000  # one row, one line: for grep
    console.print(table)


def _warn(found: registry.Registry) -> None:
    """Name on stderr what failed, one line each."""
    failed = [f"plugin {report.name!r}: {report.error}" for report in found.plugins() if report.error]
    for problem in [*failed, *found.clashes()]:
        print(f"metaopt: {problem}", file=sys.stderr)
