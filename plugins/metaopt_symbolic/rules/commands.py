"""``metaopt discover rule --proposer``: rules that proposers write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from metaopt_symbolic.proposals.commands import Asked, end, opened, search

if TYPE_CHECKING:
    from rich.console import Console

    from metaopt.task import Task
    from metaopt_symbolic.cascade import Stage

GOAL = (
    "Find an update rule that trains small neural networks to a small validation loss in few steps, better than AdamW and Lion "
    "do. It is tried on classification and regression, with several lengths of training, up to some hundred steps, and several "
    "seeds. The score is the mean validation loss at the end, normalised; the best of eleven learning rates counts. Rules that "
    "do poorly on short runs make no long ones: their score has 4 more for each stage that they missed."
)
"""What proposers are told."""

LONGEST = 40
"""Statements: what proposers are told. AdamW with bias correction has 27."""

ISLANDS = {"temperature": 0.005, "resolution": 0.005}
"""Losses of good rules differ by some thousandths, those of preference losses by hundredths."""


def by_proposers(
    asked: Asked, start: str, described: str, tasks: Mapping[str, Task], stages: Sequence[Stage], console: Console
) -> None:
    """Search for rules that proposers write, beginning with a tuned program.

    Args:
        asked: by the user.
        start: text of the program to start from.
        described: `metaopt_symbolic.report.describe` of the tasks and stages.
        tasks: by name.
        stages: of the judge.
        console: where the search is shown.
    """
    from metaopt_symbolic.baselines import tuned_for
    from metaopt_symbolic.rules import report
    from metaopt_symbolic.rules.candidate import RuleValidator
    from metaopt_symbolic.rules.judge import Judge, describe

    with opened(asked, RuleValidator()) as proposers:
        tuned = tuned_for(asked.out, start, described, tasks, stages, console)
        tuned.save(asked.out)
        references = {name: -fitness for name, fitness in tuned.references.items()}
        ended = search(
            asked, proposers, Judge(tasks, stages), console, references,
            goal=GOAL, judge=describe(described), start={"start": tuned.start}, longest=LONGEST, islands=ISLANDS,
        )  # fmt: skip
    written = report.save(ended.loop, ended.ledger, references)
    best = ended.loop.best
    console.print(
        f"champion, validation loss {best.score.text} at {best.score.multiplier:g} times its learning rate: {best.name}\n"
        f"{best.source}",
        highlight=False,
    )
    console.print("written: " + ", ".join(str(path) for path in written))
    console.print(f"next: metaopt discover funnel {asked.out}, or metaopt simplify {asked.out}", soft_wrap=True)
    console.print(f"      metaopt show {best.name} --from {asked.out}", soft_wrap=True)
    end(ended, console)
