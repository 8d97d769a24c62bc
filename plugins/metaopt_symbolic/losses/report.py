"""The winner of a search for losses, and pictures of losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from metaopt.files import write_atomic
from metaopt.program import evaluate
from metaopt.search import Ledger
from metaopt_symbolic.genome import Genome
from metaopt_symbolic.losses.candidate import python
from metaopt_symbolic.losses.judge import Score
from metaopt_symbolic.losses.selection import Selected
from metaopt_symbolic.proposals.candidate import Candidate
from metaopt_symbolic.proposals.loop import Loop
from metaopt_symbolic.proposals.report import numbered, png, written

SHOWN = 30.0
"""Largest |rho| of pictures."""


def save(loop: Loop[Score], selected: Selected, ledger: Ledger | None = None) -> list[Path]:
    """Write the winner's text, the report and its picture, each whole or not at all; returns their paths."""
    winner = selected.candidate
    facts = {
        "winner": {"name": winner.name, "digest": winner.digest, "source": winner.source,
                   "program": winner.genome.text(), "search": dataclasses.asdict(winner.score),
                   "selection": selected.losses, "scale": selected.scale, "rate": selected.rate},
    }  # fmt: skip
    return [
        write_atomic(loop.directory / numbered("champion.py", loop.worker), winner.source),
        *written(loop, facts, ledger),
    ]


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


def described(candidate: Candidate[Score]) -> list[str]:
    """What `metaopt show` prints before the lineage."""
    score = candidate.score
    thought = candidate.proposal.thought if candidate.proposal is not None else ""
    tasks = ", ".join(f"{name} {loss:.4f}" for name, loss in score.losses.items())
    formula = candidate.source if candidate.source.lstrip().startswith("def") else python(candidate.genome)
    return [
        f"{candidate.name} ({candidate.digest})", *([thought] if thought else []), "", formula.rstrip(), "",
        f"loss of the policy {score.text}: {tasks}",
        f"at {score.scale:g} times the log-probabilities and learning rate {score.rate:g}",
    ]  # fmt: skip
