"""``metaopt discover`` and ``metaopt simplify``: search for rules, and the champion as its ten lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Device, Seed, Settings, check_device, parse_settings
from metaopt_symbolic.losses.commands import compare, loss
from metaopt_symbolic.proposals.commands import Asked, Calls, Money, Tokens

discover = typer.Typer(help="Search for optimizers and losses.", rich_markup_mode="rich")
discover.command("loss")(loss)
discover.command("compare")(compare)

Tasks = Annotated[
    str,
    typer.Option(help="Suites of a search (search, broad, sign), tasks, and suite:NAME, with commas between them."),
]


@discover.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """Search for optimizers and losses."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@discover.command("rule")
def rule(
    start: Annotated[
        str,
        typer.Option(
            help="The program to start from: adamw, lion, rmsprop, momentum, adabelief, muon, a program's file.txt, or a rule "
            "of elementwise text, registered or FILE.py:RULE."
        ),
    ] = "adamw",
    tasks: Tasks = "search",
    budget: Annotated[
        str,
        typer.Option(
            help="Time (90s, 20m, 2h) or a number of a searcher's children (50000) or of proposed rules to train (200), "
            "earlier runs included."
        ),
    ] = "20m",
    out: Annotated[
        Path, typer.Option(help="Directory of the search; one that holds a search goes on.", file_okay=False)
    ] = Path("runs/discover"),
    searcher: Annotated[
        str | None, typer.Option(help="metaopt list proposers, those tagged rule; default: evolution.")
    ] = None,
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Who writes rules, in place of a searcher: those tagged text or llm, several with commas between them."
        ),
    ] = None,
    calls: Calls = None,
    tokens: Tokens = None,
    money: Money = None,
    batch: Annotated[
        int | None, typer.Option(help="Proposals that are asked for at the same time; default: 16.", min=1)
    ] = None,
    worker: Annotated[int, typer.Option(help="Number of this process among those that share a search.", min=0)] = 0,
    storage: Annotated[
        str | None, typer.Option(help="URL of an Optuna storage for the archive; default: a journal file in OUT.")
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="usual: short runs, one learning rate for all tasks; thorough: longer runs, a rate for each."
        ),
    ] = "usual",
    device: Device = "cpu",
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006 - typer copies it
) -> None:
    """Search for a rule, as Lion was found; running the same command again goes on.

    With --proposer language models write the rules, and --set gives their options, such as model=NAME. Several processes share
    one search: start each with its own --worker and the same other options.

    Example: [bold]metaopt discover rule --start adamw --tasks search --budget 20m --out runs/found[/bold]
    """
    from rich.console import Console

    from metaopt import registry
    from metaopt.search import Budget as Limits
    from metaopt_symbolic import report
    from metaopt_symbolic.baselines import tuned_for
    from metaopt_symbolic.cascade import JUDGES, Cascade
    from metaopt_symbolic.proposals.proposers import NO_LIMITS, registered
    from metaopt_symbolic.rules.commands import by_proposers
    from metaopt_symbolic.search import Budget, Search, SearchConfig
    from metaopt_symbolic.start import start_text
    from metaopt_symbolic.suites import search_tasks

    if searcher is not None and proposer is not None:
        raise ValueError(f"rules come from a searcher or from proposers, got {searcher} and {proposer}; leave one out")
    searcher = searcher or "evolution"
    if "rule" not in registry.get("proposer", searcher).tags:
        raise ValueError(
            f"{searcher} is no searcher; choose from {', '.join(registered('rule'))}, or give it as --proposer"
        )
    if judge not in JUDGES:
        raise ValueError(f"judge must be one of {', '.join(JUDGES)}, got {judge!r}")
    limits = Limits(calls, tokens, money)
    if proposer is None and (limits != NO_LIMITS or batch is not None):
        raise ValueError("calls, tokens, money and batch are of proposers; give --proposer, or leave them out")
    console = Console(stderr=True)
    spent = Budget.of(budget)
    used = search_tasks(tasks, check_device(device))
    stages = JUDGES[judge](list(used))
    described = report.describe(tasks, judge, used, stages)
    if proposer is not None:
        asked = Asked(proposer, budget, out, limits, parse_settings(settings), batch or 16, storage, worker, seed)
        by_proposers(asked, start_text(start), described, used, stages, console)
        return
    tuned = tuned_for(out, start_text(start), described, used, stages, console)
    references = tuned.references
    config = SearchConfig(tuned.start, searcher, parse_settings(settings), described, seed=seed)
    search = Search(config, Cascade(used, stages), out, storage, worker)
    tuned.save(out)
    if spent.is_spent(search.counts):
        console.print(f"the budget of {budget} is used up: what was done in {out} before counts; give more to go on")
    try:
        with report.live(search, spent, console, references) as show:
            search.run(spent, on_generation=show)
    except KeyboardInterrupt:
        console.print(f"stopped after generation {search.counts.generations}, which is saved; the same command goes on")
        raise
    finally:
        written = report.save(search, out, references)
    console.print(report.table(search, spent, references))
    console.print(
        f"champion, fitness {search.champion.score.fitness:.4f}:\n{search.champion.tuned.text()}", highlight=False
    )
    console.print("written: " + ", ".join(str(path) for path in written))


@discover.command("funnel")
def funnel_(
    directory: Annotated[Path, typer.Argument(help="Directory of a search: OUT of metaopt discover rule.")],
    most: Annotated[int, typer.Option(help="How many of the elites take part, of those alike the best.", min=1)] = 5,
    storage: Annotated[str | None, typer.Option(help="URL of the archive, if the search had one.")] = None,
    device: Device = "cpu",
) -> None:
    """Find the champion among the elites of a search: who beats tuned AdamW on longer and wider tasks, then on valid ones.

    Example: [bold]metaopt discover funnel runs/found[/bold]
    """
    import json

    from rich.console import Console

    from metaopt.files import write_atomic
    from metaopt.search import Archive
    from metaopt_symbolic.champion import FUNNEL_FILE
    from metaopt_symbolic.funnel import distinct, funnel, table, usual_gates
    from metaopt_symbolic.search import STUDY

    archive = Archive(directory, STUDY, None, storage)
    asked = json.loads(archive.settings["judge"])["asked"]
    found = funnel(distinct(archive.elites(), most), usual_gates(asked, check_device(device)))
    console = Console(stderr=True)
    console.print(table(found))
    verdict = "champion" if found.passed else "no candidate is better than tuned AdamW at every gate; the best is"
    console.print(f"{verdict}:\n{found.champion.text()}", highlight=False)
    written = [
        write_atomic(directory / FUNNEL_FILE, json.dumps(found.to_json(), indent=1) + "\n"),
        write_atomic(directory / "champion.txt", found.champion.text()),
    ]
    console.print("written: " + ", ".join(str(path) for path in written))


def simplify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a search.")],
    tolerance: Annotated[float, typer.Option(help="Loss of fitness that a shorter program may cost.", min=0)] = 0.005,
    storage: Annotated[str | None, typer.Option(help="As for discover rule.")] = None,
) -> None:
    """Shorten the champion of a search (of its funnel, if there was one), and write it as the Python file of a rule.

    Example: [bold]metaopt simplify runs/found[/bold]
    """
    from rich.console import Console

    from metaopt_symbolic.champion import write_champion

    console = Console(stderr=True)
    result, path = write_champion(directory, tolerance=tolerance, storage=storage)
    for line in result.log:
        console.print(line, highlight=False)
    console.print(result.genome.text(), highlight=False)
    console.print(f"written: {path}")
    console.print(f"next: metaopt race {path}:Champion adamw lion --tasks suite:fast", soft_wrap=True)
    console.print(f"      metaopt export {path}:Champion --to my_optimizer.py --class MyOptimizer", soft_wrap=True)
