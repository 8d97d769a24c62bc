"""A search while it runs, and after: a live view, a table, a picture, and JSON with all of it."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from metaopt.files import write_atomic
from metaopt.suite import content_hash
from metaopt.task import Task
from metaopt_symbolic.cascade import Stage
from metaopt_symbolic.search import Budget, Counts, Search

PER_SECOND = 2
"""How often the live view changes."""

QUIET = 30.0
"""Seconds after which a search that tells nothing new says that it lives."""


def describe(asked: str, judge: str, tasks: Mapping[str, Task], stages: Sequence[Stage]) -> str:
    """The judge of a search in words, ``asked`` and ``judge`` those of the user: another text means other fitness.

    The kind of the device is part of it, since sums round as the device adds.
    """
    hashes = {name: content_hash(task) for name, task in tasks.items()}
    (device,) = {task.device.type for task in tasks.values()}
    plain = [dataclasses.asdict(stage) for stage in stages]
    return json.dumps({"asked": asked, "judge": judge, "device": device, "tasks": hashes, "stages": plain})


@contextmanager
def live(
    search: Search, budget: Budget, console: Console, references: Mapping[str, float]
) -> Iterator[Callable[[Search], None]]:
    """A table of the search that changes as it goes on; hand what it gives to `Search.run`."""
    rows = len(search.history)

    def on_generation(_: Search) -> None:
        nonlocal rows
        if console.is_terminal or len(search.history) > rows:  # a line for every row of the history
            rows = len(search.history)
            show()

    with watched(console, lambda: table(search, budget, references), lambda: line(search)) as show:
        yield on_generation


@contextmanager
def watched(console: Console, table: Callable[[], Table], line: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """What to call whenever a search has got on: it shows a table on terminals, lines elsewhere.

    Elsewhere a search that does not get on, because a server thinks or training takes long, shows that it lives: there is a
    line in any minute.

    Args:
        console: where.
        table: of the search at that moment.
        line: of the search at that moment.
    """
    if not console.is_terminal:
        with _logged(console, line) as log:
            yield log
        return
    last = 0.0
    with Live(table(), console=console, auto_refresh=False, transient=True) as view:

        def show() -> None:
            nonlocal last
            if (now := time.monotonic()) - last > 1 / PER_SECOND:
                view.update(table(), refresh=True)
                last = now

        yield show


@contextmanager
def _logged(console: Console, line: Callable[[], str]) -> Iterator[Callable[[], None]]:
    told, ended = time.monotonic(), threading.Event()

    def log() -> None:
        nonlocal told
        told = time.monotonic()
        console.print(line(), soft_wrap=True, highlight=False)

    def log_life() -> None:
        while not ended.wait(QUIET):
            if (quiet := time.monotonic() - told) >= QUIET:
                console.print(f"{line()}; at work on the next for {quiet:.0f} s", soft_wrap=True, highlight=False)

    thread = threading.Thread(target=log_life, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        ended.set()
        thread.join()


def line(search: Search) -> str:
    """The state of a search in a line, for files and pipes."""
    c = search.counts
    return (
        f"{c.children:,} children, {c.unique:,} trained, {c.hits:.0%} known, {c.redundancy:.0%} redundant, "
        f"best {search.champion.score.fitness:.4f}, {c.seconds:.0f} s"
    )


def table(
    search: Search, budget: Budget | None = None, references: Mapping[str, float] = MappingProxyType({})
) -> Table:
    """The state of a search; ``references`` are fitnesses to compare with, by name."""
    c = search.counts
    made = Table(title=f"worker {search.worker} of {search.directory}", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    rows = {
        "best fitness (start)": f"{search.champion.score.fitness:.4f} ({search.start_fitness:.4f})",
        **{f"fitness of tuned {name}": f"{fitness:.4f}" for name, fitness in references.items()},
        "found in generation": f"{search.champion.generation} of {c.generations}",
        "children": _of(c.children, budget.children if budget else None),
        "known by structure": _share(c.by_hash, c.children),
        "known by behaviour": _share(c.by_behaviour, c.children),
        "no numbers, or without the gradient": f"{c.not_finite}, {c.inert}",
        "trained": _of(c.unique, budget.unique if budget else None),
        "of these diverged": f"{c.diverged}",
        "redundant statements": f"{100 * c.redundancy:.1f} %",
        "inner steps": f"{c.updates:,}",
        "seconds": _of(round(c.seconds), budget.seconds if budget else None),
        "children, trained, steps per second": _rates(c),
    }
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


def _of(spent: float, most: float | None) -> str:
    return f"{spent:,}" if most is None else f"{spent:,} of {most:,.0f}"


def _rates(c: Counts) -> str:
    seconds = max(c.seconds, 1e-9)
    return f"{c.children / seconds:,.0f}, {c.unique / seconds:,.1f}, {c.updates / seconds:,.0f}"


def save(search: Search, directory: Path, references: Mapping[str, float] = MappingProxyType({})) -> list[Path]:
    """Write the champion's text, the report and its picture, each whole or not at all; returns their paths."""
    suffix = f"-{search.worker}" if search.worker else ""
    champion = search.champion
    facts = {
        "config": dataclasses.asdict(search.config),
        "worker": search.worker,
        "start_fitness": search.start_fitness,
        "references": dict(references),
        "counts": dataclasses.asdict(search.counts),
        "hits": search.counts.hits,
        "redundancy": search.counts.redundancy,
        "champion": {"text": champion.tuned.text(), **dataclasses.asdict(champion.score), "generation": champion.generation},
        "history": search.history,
    }  # fmt: skip
    return [
        write_atomic(directory / f"champion{suffix}.txt", champion.tuned.text()),
        write_atomic(directory / f"report{suffix}.json", json.dumps(facts, indent=1) + "\n"),
        write_atomic(directory / f"search{suffix}.png", _picture(search, references)),
    ]


def _picture(search: Search, references: Mapping[str, float]) -> bytes:
    from matplotlib.figure import Figure

    rows = search.history
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    best, shares = figure.subplots(1, 2)
    unique = [row["counts"]["unique"] for row in rows]
    best.plot(unique, [row["best"] for row in rows], marker=".")
    best.axhline(search.start_fitness, color="gray", linestyle=":", label="start")
    for color, (name, fitness) in zip(("tab:orange", "tab:green"), references.items(), strict=False):
        best.axhline(fitness, color=color, linestyle="--", label=f"tuned {name}")
    best.set(xlabel="trained candidates", ylabel="fitness of the best")
    best.legend()
    children = [row["counts"]["children"] for row in rows]
    shares.plot(children, [row["hits"] for row in rows], label="children that were known")
    shares.plot(children, [row["redundancy"] for row in rows], label="redundant statements")
    shares.set(xlabel="children", ylabel="share of the last 1,000", ylim=(0, 1))
    shares.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120, metadata={"Software": None})
    return target.getvalue()
