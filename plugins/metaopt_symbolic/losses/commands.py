"""``metaopt discover loss`` and ``metaopt discover compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Seed, Settings, parse_settings
from metaopt_symbolic.proposals.commands import Asked, Batch, Calls, Money, Tokens, end, opened, search

GOAL = (
    "Find a loss for learning from preferences that trains the policy with the highest expected reward, also where a share of "
    "the pairs is ranked the wrong way round. The score is how much reward the trained policy lacks: 1 is the reference "
    "policy, 0 the best answers, so the smaller the better. Each loss is tried at several scales of rho and learning rates."
)
"""What proposers are told."""


def loss(
    task: Annotated[str, typer.Option(help="What losses are for: preference.")] = "preference",
    proposer: Annotated[
        str, typer.Option(help="metaopt list proposers, those tagged text or llm; several with commas between them.")
    ] = "mutator",
    budget: Annotated[
        str, typer.Option(help="Time (90s, 20m, 2h) or a number of losses to train with (200), earlier runs included.")
    ] = "200",
    out: Annotated[
        Path, typer.Option(help="Directory of the search; one that holds a search goes on.", file_okay=False)
    ] = Path("runs/losses"),
    calls: Calls = None,
    tokens: Tokens = None,
    money: Money = None,
    worker: Annotated[int, typer.Option(help="Number of this process among those that share a search.", min=0)] = 0,
    batch: Batch = 16,
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

    from metaopt.search import Budget as Limits
    from metaopt_symbolic.genome import LOSS_SEEDS
    from metaopt_symbolic.losses import report
    from metaopt_symbolic.losses.candidate import LossValidator
    from metaopt_symbolic.losses.judge import Judge, search_stages, selection_stage
    from metaopt_symbolic.losses.selection import select

    if task != "preference":
        raise ValueError(f"losses are searched for the task preference, got {task!r}")
    limits, options = Limits(calls, tokens, money), parse_settings(settings)
    asked = Asked(proposer, budget, out, limits, options, batch, storage, worker, seed)
    judge, console = Judge(search_stages()), Console(stderr=True)
    with opened(asked, LossValidator()) as proposers:
        ended = search(asked, proposers, judge, console, goal=GOAL, judge=judge.describe(), start=LOSS_SEEDS)
    selected = select(ended.loop.candidates, judge, selection_stage())
    written = report.save(ended.loop, selected, ended.ledger)
    winner = selected.candidate
    console.print(
        f"best on other noise levels, {selected.losses[winner.number]:.4f}: {winner.name}\n{winner.source}",
        highlight=False,
    )
    if winner.proposal is None:
        console.print("that is a loss which the search began with: nothing found was better there", soft_wrap=True)
    console.print("written: " + ", ".join(str(path) for path in written))
    console.print(f"next: metaopt show {winner.name} --from {out}", soft_wrap=True)
    end(ended, console)


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
