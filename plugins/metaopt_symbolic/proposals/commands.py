"""What ``metaopt discover loss`` and ``metaopt discover rule --proposer`` share, and ``metaopt show``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from metaopt.search import Budget, Ledger, Proposer, ProposerError
    from metaopt_symbolic.proposals.candidate import CandidateScore, CandidateValidator
    from metaopt_symbolic.proposals.loop import Judge, Loop

S = TypeVar("S", bound="CandidateScore")

Calls = Annotated[int | None, typer.Option(help="Calls of language models at most.", min=0)]
Tokens = Annotated[int | None, typer.Option(help="Tokens of both directions that these may take.", min=0)]
Money = Annotated[float | None, typer.Option(help="What these may cost, by --set price_input and price_output.", min=0)]
Batch = Annotated[int, typer.Option(help="Proposals that are asked for at the same time.", min=1)]

NAMED = 5
"""Of how many candidates an error gives the names."""


@dataclass(frozen=True)
class Asked:
    """What users say of a search by proposers, whatever it is for.

    Attributes:
        proposers: names with commas between them.
        budget: time, or a number of candidates that are trained.
        out: directory.
        limits: of language models.
        options: of these.
        batch, storage, worker, seed: see `metaopt_symbolic.proposals.loop`.
    """

    proposers: str
    budget: str
    out: Path
    limits: Budget
    options: Mapping[str, Any]
    batch: int
    storage: str | None
    worker: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the proposers."""
        return tuple(name.strip() for name in self.proposers.split(","))


@dataclass(frozen=True)
class Ended(Generic[S]):
    """A search whose budget is spent, or whose proposers answer no more: then ``early`` says why."""

    loop: Loop[S]
    ledger: Ledger
    early: ProposerError | None


@dataclass(frozen=True)
class Opened(Generic[S]):
    """Proposers that are in use, the ledger of their calls, and what they validate with."""

    proposer: Proposer
    ledger: Ledger
    validator: CandidateValidator[S]


@contextmanager
def opened(asked: Asked, validator: CandidateValidator[S]) -> Iterator[Opened[S]]:
    """The proposers that a user asks for, until the context ends.

    Raises:
        ValueError: proposers that cannot be had, or no budget.
    """
    from metaopt_symbolic.proposals.proposers import proposing
    from metaopt_symbolic.search import Budget

    Budget.of(asked.budget)
    with proposing(
        asked.names,
        validator,
        asked.out,
        options=asked.options,
        limits=asked.limits,
        seed=asked.seed,
        worker=asked.worker,
    ) as (proposer, ledger):
        yield Opened(proposer, ledger, validator)


def search(
    asked: Asked,
    proposers: Opened[S],
    scorer: Judge[S],
    console: Console,
    references: Mapping[str, float] = MappingProxyType({}),
    **config: Any,
) -> Ended[S]:
    """Search, with a table or lines on ``console``.

    Args:
        asked: by the user.
        proposers: whom the user asks for.
        scorer: the judge, fresh.
        console: where.
        references: losses to compare with, by name.
        **config: what only such searches have of `metaopt_symbolic.proposals.loop.LoopConfig`.

    Raises:
        KeyboardInterrupt: what was done is saved.
    """
    from rich.table import Table

    from metaopt.search import ProposerError
    from metaopt_symbolic.proposals import report
    from metaopt_symbolic.proposals.loop import Loop, LoopConfig
    from metaopt_symbolic.proposals.proposers import registered
    from metaopt_symbolic.report import watched
    from metaopt_symbolic.search import Budget

    spent = Budget.of(asked.budget)
    ahead = not {*asked.names}.isdisjoint(registered("llm"))
    made = LoopConfig(proposers=asked.names, batch=asked.batch, ahead=ahead, seed=asked.seed, **config)
    loop = Loop(made, scorer, proposers.proposer, proposers.validator, asked.out, asked.storage, asked.worker)
    early = None

    def table() -> Table:
        return report.table(loop, spent.children, proposers.ledger, references)

    try:
        with watched(console, table, lambda: report.line(loop)) as show:
            loop.run(evaluations=spent.children, seconds=spent.seconds, on_round=lambda _: show())
    except ProposerError as error:
        early = error
    except KeyboardInterrupt:
        console.print(f"stopped after round {loop.counts.rounds}, which is saved; the same command goes on")
        raise
    console.print(table())
    return Ended(loop, proposers.ledger, early)


def end(ended: Ended[S], console: Console) -> None:
    """Say why a search ended early, if it did.

    Raises:
        typer.Exit: with code 1, or 0 where only the budget of calls is spent.
    """
    from metaopt.search import BudgetSpent

    if ended.early is not None:
        console.print(
            f"the search ended early: {ended.early}; the same command goes on",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(0 if isinstance(ended.early, BudgetSpent) else 1)


def show(
    candidate: Annotated[str, typer.Argument(help="Name or digest of a candidate, or best.")] = "best",
    directory: Annotated[Path, typer.Option("--from", help="Directory of the search.")] = Path("runs/losses"),
) -> None:
    """Print a candidate of a search by proposers: formula, scores, lineage; and draw it beside its parent and the start.

    Example: [bold]metaopt show best --from runs/losses[/bold]
    """
    from rich.console import Console

    from metaopt.files import write_atomic
    from metaopt_symbolic.losses import report as of_losses
    from metaopt_symbolic.losses.candidate import LossValidator
    from metaopt_symbolic.proposals.candidate import study_of, workers
    from metaopt_symbolic.proposals.report import lineage
    from metaopt_symbolic.rules import report as of_rules
    from metaopt_symbolic.rules.candidate import RuleValidator

    is_rule = study_of(directory) == RuleValidator.study
    validator: Any = RuleValidator() if is_rule else LossValidator()
    report: Any = of_rules if is_rule else of_losses
    searched = [(c, found) for k in workers(directory) for found in [validator.load(directory, k)] for c in found]
    if candidate == "best":
        found = [min(searched, key=lambda pair: pair[0].score.loss)]
    else:
        found = [pair for pair in searched if candidate == pair[0].name or pair[0].digest.startswith(candidate)]
    if not found:
        names = [c.name for c, _ in sorted(searched, key=lambda pair: pair[0].score.loss)[:NAMED]]
        raise ValueError(f"there is no candidate {candidate!r} in {directory}; the best are {', '.join(names)}")
    shown, candidates = found[0]
    console = Console()
    for text in [*report.described(shown), "", *lineage(shown, candidates)]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    first = candidates[0]
    compared = {c.name: c.genome for c in (shown, *(candidates[k] for k in shown.parents[:1]), first)}
    path = write_atomic(directory / f"{shown.name}.png", report.curves(compared))
    console.print(f"written: {path}", soft_wrap=True)
