"""A search by proposers while it runs, and after: a table, a picture, and JSON with all of it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table

from metaopt.files import write_atomic
from metaopt.search import Ledger
from metaopt_symbolic.proposals.candidate import Candidate, S
from metaopt_symbolic.proposals.loop import Loop

NOTHING: Mapping[str, float] = MappingProxyType({})


def table(
    loop: Loop[S],
    evaluations: int | None = None,
    ledger: Ledger | None = None,
    references: Mapping[str, float] = NOTHING,
) -> Table:
    """The state of a search, and of the calls of its proposers, if they make any; ``references`` as of `written`."""
    c, best = loop.counts, loop.best
    made = Table(title=f"worker {loop.worker} of {loop.directory}", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    starts = [candidate for candidate in loop.candidates if candidate.proposal is None]
    rows = {
        f"best {loop.validator.measure}": f"{best.score.text}, {best.name}",
        **{f"of {start.name}": start.score.text for start in starts},
        **{f"of tuned {name}": f"{loss:.4f}" for name, loss in references.items()},
        "found in round": f"{best.round} of {c.rounds}",
        "proposed": f"{c.proposed:,}",
        "invalid, the same as another": f"{c.invalid:,}, {c.known:,}",
        "without a candidate, unanswered": f"{c.unreadable:,}, {c.failed:,}",
        "trained with": f"{c.evaluated:,}" if evaluations is None else f"{c.evaluated:,} of {evaluations:,}",
        "to the last stage": f"{c.full:,}",
        **{f"by {name}": text for name, text in _by_proposer(loop).items()},
        **(_calls(ledger) if ledger is not None else {}),
        "tokens, cost": f"{c.tokens:,}, {c.cost:.4g}",
        "seconds": f"{c.seconds:,.0f}",
    }
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def _calls(ledger: Ledger) -> dict[str, str]:
    made = ledger.spent.calls
    failed = {f"of calls, {kind}": f"{count:,}" for kind, count in ledger.failures.items()}
    return {"calls": f"{made:,}", **failed} if made else {}


def line(loop: Loop[S]) -> str:
    """The same in a line, for files and pipes."""
    c = loop.counts
    lost = {
        "invalid": c.invalid,
        "the same as another": c.known,
        "without a candidate": c.unreadable,
        "unanswered": c.failed,
    }
    return (
        f"{c.proposed:,} proposed, {''.join(f'{count:,} {why}, ' for why, count in lost.items() if count)}"
        f"{c.evaluated:,} trained with, best {loop.best.score.loss:.4f} "
        f"({loop.best.name}), {c.tokens:,} tokens, {c.seconds:.0f} s"
    )


def _by_proposer(loop: Loop[S]) -> dict[str, str]:
    best: dict[str, list[float]] = {}
    for candidate in loop.candidates:
        if candidate.proposal is not None:
            best.setdefault(candidate.proposal.proposer, []).append(candidate.score.loss)
    return {name: f"{len(losses):,}, best {min(losses):.4f}" for name, losses in best.items()}


def written(
    loop: Loop[S], facts: Mapping[str, Any], ledger: Ledger | None = None, references: Mapping[str, float] = NOTHING
) -> list[Path]:
    """Write the report and its picture, each whole or not at all; returns their paths.

    Args:
        loop: the search.
        facts: of the report, beside what all such searches have.
        ledger: of its language models.
        references: losses to compare with, by name.
    """
    common = {
        "config": dataclasses.asdict(loop.config),
        "worker": loop.worker,
        "counts": dataclasses.asdict(loop.counts),
        "errors": loop.errors,
        "calls": ledger and {**dataclasses.asdict(ledger.spent), "failures": ledger.failures},
        "history": [[c.number, c.score.loss] for c in loop.candidates],
    }
    return [
        write_atomic(
            loop.directory / numbered("report.json", loop.worker), json.dumps({**common, **facts}, indent=1) + "\n"
        ),
        write_atomic(loop.directory / numbered("search.png", loop.worker), _history(loop, references)),
    ]


def numbered(file: str, worker: int) -> str:
    """The name of a worker's own file; that of worker 0 has no number."""
    path = Path(file)
    return f"{path.stem}-{worker}{path.suffix}" if worker else file


def _history(loop: Loop[S], references: Mapping[str, float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    last = max(c.score.stage for c in loop.candidates)
    full = [c for c in loop.candidates if c.score.stage == last]
    best = [min(c.score.loss for c in full[: k + 1]) for k in range(len(full))]
    axes.plot([c.number for c in full], [c.score.loss for c in full], ".", color="lightgray")
    axes.step([c.number for c in full], best, where="post")
    lines = {c.name: c.score.loss for c in full if c.proposal is None}
    lines |= {f"tuned {name}": loss for name, loss in references.items()}
    for k, (name, loss) in enumerate(lines.items()):
        axes.axhline(loss, linestyle="--", color=f"C{k + 1}", label=name)
    low, high = min(best), best[0]
    axes.set(xlabel="candidates", ylabel=loop.validator.measure, ylim=(low - 0.1 * abs(low), high + 0.05 * abs(high)))
    axes.legend()
    return png(figure)


def png(figure: Any) -> bytes:
    """A figure's bytes, the same for equal figures."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120, metadata={"Software": None})
    return target.getvalue()


def lineage(candidate: Candidate[S], candidates: Sequence[Candidate[S]], depth: int = 6) -> list[str]:
    """A line for the candidate and for each of its first parents, up to ``depth`` of them."""
    lines = []
    while True:
        by = candidate.proposal.proposer if candidate.proposal is not None else "start"
        others = ", ".join(candidates[k].name for k in candidate.parents[1:])
        lines.append(
            f"{candidate.name}: {candidate.score.text}, by {by}" + (f", also shown {others}" if others else "")
        )
        if not candidate.parents or len(lines) > depth:
            return lines
        candidate = candidates[candidate.parents[0]]
