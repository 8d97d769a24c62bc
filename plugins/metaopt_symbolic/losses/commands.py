"""``metaopt discover loss`` and ``metaopt show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Seed, Settings, parse_settings

GOAL = (
    "Find a loss for learning from preferences that trains the policy with the highest expected reward, also where a share of "
    "the pairs is ranked the wrong way round. The score is how much reward the trained policy lacks: 1 is the reference "
    "policy, 0 the best answers, so the smaller the better. Each loss is tried at several scales of rho and learning rates."
)
"""What proposers are told."""

NAMED = 5
"""Of how many candidates an error gives the names."""


def loss(
    task: Annotated[str, typer.Option(help="What losses are for: preference.")] = "preference",
    proposer: Annotated[
        str, typer.Option(help="metaopt list proposers, those tagged loss or llm; several with commas between them.")
    ] = "mutator",
    budget: Annotated[
        str, typer.Option(help="Time (90s, 20m, 2h) or a number of losses to train with (200), earlier runs included.")
    ] = "200",
    out: Annotated[
        Path, typer.Option(help="Directory of the search; one that holds a search goes on.", file_okay=False)
    ] = Path("runs/losses"),
    calls: Annotated[int | None, typer.Option(help="Calls of language models at most.", min=0)] = None,
    money: Annotated[
        float | None, typer.Option(help="What these may cost, by --set price_input and price_output.", min=0)
    ] = None,
    worker: Annotated[int, typer.Option(help="Number of this process among those that share a search.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Proposals that are asked for at the same time.", min=1)] = 16,
    storage: Annotated[
        str | None, typer.Option(help="URL of an Optuna storage for the archive; default: a journal file in OUT.")
    ] = None,
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006 - typer copies it
) -> None:
    """Search for a loss, as DiscoPOP was found; running the same command again goes on, and pays for nothing twice.

    --set gives options of the language models, such as model=NAME. Several processes share one search: start each with its own
    --worker and the same other options.

    Example: [bold]metaopt discover loss --proposer mutator --budget 200 --out runs/losses[/bold]
    """
    from rich.console import Console
    from rich.table import Table

    from metaopt.search import BudgetSpent, ProposerError
    from metaopt_symbolic.losses import report
    from metaopt_symbolic.losses.candidate import LossValidator
    from metaopt_symbolic.losses.judge import Judge, search_stages, selection_stage
    from metaopt_symbolic.losses.loop import Loop, LoopConfig, select
    from metaopt_symbolic.losses.proposers import proposing, registered
    from metaopt_symbolic.report import watched
    from metaopt_symbolic.search import Budget

    if task != "preference":
        raise ValueError(f"losses are searched for the task preference, got {task!r}")
    spent = Budget.of(budget)
    names = tuple(name.strip() for name in proposer.split(","))
    validator, judge = LossValidator(), Judge(search_stages())
    console = Console(stderr=True)
    ahead = not {*names}.isdisjoint(registered("llm"))
    config = LoopConfig(GOAL, names, judge.describe(), batch=batch, ahead=ahead, seed=seed)
    options = parse_settings(settings)
    with proposing(names, validator, out, options=options, calls=calls, money=money, seed=seed, worker=worker) as (
        asked, ledger
    ):  # fmt: skip
        loop, early = Loop(config, judge, asked, validator, out, storage, worker), None

        def table() -> Table:
            return report.table(loop, spent.children, ledger)

        try:
            with watched(console, table, lambda: report.line(loop)) as show:
                loop.run(evaluations=spent.children, seconds=spent.seconds, on_round=lambda _: show())
        except ProposerError as error:
            early = error
        except KeyboardInterrupt:
            console.print(f"stopped after round {loop.counts.rounds}, which is saved; the same command goes on")
            raise
    selected = select(loop.candidates, judge, selection_stage())
    written = report.save(loop, selected, ledger)
    console.print(table())
    winner = selected.candidate
    console.print(
        f"best on other noise levels, {selected.losses[winner.number]:.4f}: {winner.name}\n{winner.source}",
        highlight=False,
    )
    console.print("written: " + ", ".join(str(path) for path in written))
    console.print(f"next: metaopt show {winner.name} --from {out}", soft_wrap=True)
    if early is not None:
        console.print(
            f"the search ended early: {early}; the same command goes on", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(0 if isinstance(early, BudgetSpent) else 1)


def show(
    candidate: Annotated[str, typer.Argument(help="Name or digest of a candidate, or best.")] = "best",
    directory: Annotated[Path, typer.Option("--from", help="Directory of the search.")] = Path("runs/losses"),
) -> None:
    """Print a candidate of a search for losses: formula, scores, lineage; and draw it beside its parent and DPO.

    Example: [bold]metaopt show best --from runs/losses[/bold]
    """
    from rich.console import Console

    from metaopt.files import write_atomic
    from metaopt_symbolic.losses import report
    from metaopt_symbolic.losses.loop import load, workers

    searched = [
        (c, candidates) for k in workers(directory) or [0] for candidates in [load(directory, k)] for c in candidates
    ]
    if candidate == "best":
        found = [min(searched, key=lambda pair: pair[0].score.loss)]
    else:
        found = [pair for pair in searched if candidate == pair[0].name or pair[0].digest.startswith(candidate)]
    if not found:
        names = [c.name for c, _ in sorted(searched, key=lambda pair: pair[0].score.loss)[:NAMED]]
        raise ValueError(f"there is no candidate {candidate!r} in {directory}; the best are {', '.join(names)}")
    shown, candidates = found[0]
    console = Console()
    for text in [*report.described(shown), "", *report.lineage(shown, candidates)]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    compared = {shown.name: shown.genome} | {c.name: c.genome for k in shown.parents[:1] for c in [candidates[k]]}
    path = write_atomic(directory / f"{shown.name}.png", report.curves({**compared, "dpo": candidates[0].genome}))
    console.print(f"written: {path}", soft_wrap=True)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of searches that have ended.")],
) -> None:
    """Compare the selected losses of searches with tuned DPO, IPO, SLiC, LRML and cDPO on tasks that chose nothing.

    Takes some minutes; each directory gets comparison.json and its pictures.

    Example: [bold]metaopt discover compare runs/losses[/bold]
    """
    from rich.console import Console

    from metaopt_symbolic.losses import comparison

    by_name = {run.resolve().name: run for run in runs}
    if len(by_name) < len(runs):
        raise ValueError(
            f"searches are told apart by the names of their directories, got {', '.join(map(str, runs))}; rename one"
        )
    facts, contestants = comparison.compare(by_name)
    console = Console()
    console.print(comparison.table(facts))
    for run in runs:
        written = comparison.save(facts, contestants, run)
        console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)
