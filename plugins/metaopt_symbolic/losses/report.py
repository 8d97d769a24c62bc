"""A search for losses while it runs, and after: a table, pictures, and JSON with all of it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from metaopt.files import write_atomic
from metaopt.program import evaluate
from metaopt.search import Ledger
from metaopt_symbolic.genome import Genome
from metaopt_symbolic.losses.candidate import python
from metaopt_symbolic.losses.loop import Candidate, Loop, Selected

SHOWN = 30.0
"""Largest |rho| of pictures."""


def table(loop: Loop, evaluations: int | None = None, ledger: Ledger | None = None) -> Table:
    """The state of a search, and of the calls of its proposers, if they make any."""
    c, best = loop.counts, loop.best
    made = Table(title=f"worker {loop.worker} of {loop.directory}", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    starts = [candidate for candidate in loop.candidates if candidate.proposal is None]
    rows = {
        "best loss of a policy": f"{_interval(best)}, {best.name}",
        **{f"of {start.name}": _interval(start) for start in starts},
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


def line(loop: Loop) -> str:
    """The same in a line, for files and pipes."""
    c = loop.counts
    return (
        f"{c.proposed:,} proposed, {c.invalid:,} invalid, {c.evaluated:,} trained with, best {loop.best.score.loss:.4f} "
        f"({loop.best.name}), {c.tokens:,} tokens, {c.seconds:.0f} s"
    )


def _by_proposer(loop: Loop) -> dict[str, str]:
    best: dict[str, list[float]] = {}
    for candidate in loop.candidates:
        if candidate.proposal is not None:
            best.setdefault(candidate.proposal.proposer, []).append(candidate.score.loss)
    return {name: f"{len(losses):,}, best {min(losses):.4f}" for name, losses in best.items()}


def _interval(candidate: Candidate) -> str:
    score = candidate.score
    return f"{score.loss:.4f} [{score.low:.4f}, {score.high:.4f}]"


def save(loop: Loop, selected: Selected, ledger: Ledger | None = None) -> list[Path]:
    """Write the winner's text, the report and its picture, each whole or not at all; returns their paths."""
    winner = selected.candidate
    facts = {
        "config": dataclasses.asdict(loop.config),
        "worker": loop.worker,
        "counts": dataclasses.asdict(loop.counts),
        "winner": {"name": winner.name, "digest": winner.digest, "source": winner.source,
                   "program": winner.genome.text(), "search": dataclasses.asdict(winner.score),
                   "selection": selected.losses, "scale": selected.scale, "rate": selected.rate},
        "errors": loop.errors,
        "calls": ledger and {**dataclasses.asdict(ledger.spent), "failures": ledger.failures},
        "history": [[c.number, c.score.loss] for c in loop.candidates],
    }  # fmt: skip
    suffix = f"-{loop.worker}" if loop.worker else ""
    return [
        write_atomic(loop.directory / f"champion{suffix}.py", winner.source),
        write_atomic(loop.directory / f"report{suffix}.json", json.dumps(facts, indent=1) + "\n"),
        write_atomic(loop.directory / f"search{suffix}.png", _history(loop)),
    ]


def _history(loop: Loop) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    last = max(c.score.stage for c in loop.candidates)
    full = [c for c in loop.candidates if c.score.stage == last]
    best = [min(c.score.loss for c in full[: k + 1]) for k in range(len(full))]
    axes.plot([c.number for c in full], [c.score.loss for c in full], ".", color="lightgray")
    axes.step([c.number for c in full], best, where="post")
    for k, start in enumerate(c for c in full if c.proposal is None):
        axes.axhline(start.score.loss, linestyle="--", color=f"C{k + 1}", label=start.name)
    axes.set(
        xlabel="candidates", ylabel="loss of the policy (1: reference, 0: best)", ylim=(0.9 * min(best), 1.05 * best[0])
    )
    axes.legend()
    return png(figure)


def curves(genomes: Mapping[str, Genome]) -> bytes:
    """Picture of losses and of their derivatives by rho, each derivative in units of its largest size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    values, slopes = figure.subplots(1, 2)
    for name, genome in genomes.items():
        rho, loss, slope = sampled(genome)
        values.plot(rho, loss - loss.mean(), label=name)
        slopes.plot(rho, slope / slope.abs().max().clamp_min(1e-30), label=name)
    values.set(xlabel="rho", ylabel="loss, less its mean")
    slopes.set(xlabel="rho", ylabel="derivative, in units of its largest")
    slopes.axhline(0, color="gray", linewidth=0.5)
    values.legend()
    return png(figure)


def sampled(genome: Genome, shown: float = SHOWN, points: int = 601) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rho, loss and derivative, float64 [points] each, over +-``shown``."""
    rho = torch.linspace(-shown, shown, points, dtype=torch.float64, requires_grad=True)
    (loss,) = evaluate(genome.program(), {"rho": rho}, {})
    (slope,) = torch.autograd.grad(loss.sum(), rho)
    return rho.detach(), loss.detach(), slope


def png(figure: Any) -> bytes:
    """A figure's bytes, the same for equal figures."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120, metadata={"Software": None})
    return target.getvalue()


def lineage(candidate: Candidate, candidates: list[Candidate], depth: int = 6) -> list[str]:
    """A line for the candidate and for each of its first parents, up to ``depth`` of them."""
    lines = []
    while True:
        by = candidate.proposal.proposer if candidate.proposal is not None else "start"
        others = ", ".join(candidates[k].name for k in candidate.parents[1:])
        lines.append(
            f"{candidate.name}: {_interval(candidate)}, by {by}" + (f", also shown {others}" if others else "")
        )
        if not candidate.parents or len(lines) > depth:
            return lines
        candidate = candidates[candidate.parents[0]]


def described(candidate: Candidate) -> list[str]:
    """What `metaopt show` prints before the lineage."""
    score = candidate.score
    thought = candidate.proposal.thought if candidate.proposal is not None else ""
    tasks = ", ".join(f"{name} {loss:.4f}" for name, loss in score.losses.items())
    formula = candidate.source if candidate.source.lstrip().startswith("def") else python(candidate.genome)
    return [
        f"{candidate.name} ({candidate.digest})", *([thought] if thought else []), "", formula.rstrip(), "",
        f"loss of the policy {_interval(candidate)}: {tasks}",
        f"at {score.scale:g} times the log-probabilities and learning rate {score.rate:g}",
    ]  # fmt: skip
