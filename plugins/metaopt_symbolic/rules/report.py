"""The champion of a search for rules by proposers, and pictures of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from metaopt.files import write_atomic
from metaopt.program import evaluate
from metaopt.search import Ledger
from metaopt_symbolic.funnel import tuned
from metaopt_symbolic.genome import Genome
from metaopt_symbolic.proposals.candidate import Candidate
from metaopt_symbolic.proposals.loop import Loop
from metaopt_symbolic.proposals.report import NOTHING, numbered, png, written
from metaopt_symbolic.rules.judge import Score

GRADIENTS = {
    "1, then -1": (1.0,) * 30 + (-1.0,) * 30,
    "1 at every tenth step, else 0": ((1.0,) + (0.0,) * 9) * 6,
}
"""Of pictures, by step."""


def save(loop: Loop[Score], ledger: Ledger, references: Mapping[str, float] = NOTHING) -> list[Path]:
    """Write the champion's program at the learning rate of its score, the report and its picture, each whole or not at all.

    Args:
        loop: the search.
        ledger: of its language models.
        references: losses to compare with, by name.

    Returns:
        The paths.
    """
    champion, told = loop.best, loop.best.proposal
    text = tuned(champion.elite(loop.worker)).text()
    facts = {
        "references": dict(references),
        "champion": {
            "name": champion.name, "digest": champion.digest, "source": champion.source, "text": text,
            "proposer": told.proposer if told else "start", "model": told.model if told else "",
            **dataclasses.asdict(champion.score),
        },
    }  # fmt: skip
    path = write_atomic(loop.directory / numbered("champion.txt", loop.worker), text)
    return [path, *written(loop, facts, ledger, references)]


def described(candidate: Candidate[Score]) -> list[str]:
    """What `metaopt show` prints before the lineage."""
    score = candidate.score
    thought = candidate.proposal.thought if candidate.proposal is not None else ""
    tasks = ", ".join(f"{name} {loss:.4f}" for name, loss in score.losses.items())
    return [
        f"{candidate.name} ({candidate.digest})", *([thought] if thought else []), "", candidate.source.rstrip(), "",
        f"validation loss {score.text} after stage {score.stage + 1}: {tasks}",
        f"at {score.multiplier:g} times its learning rate; {100 * score.diverged:.0f} % of all runs diverged",
    ]  # fmt: skip


def curves(genomes: Mapping[str, Genome]) -> bytes:
    """Picture of updates by step, of one element that stays 0, at lr = 1, for each course of `GRADIENTS`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (course, gradients) in zip(figure.subplots(1, len(GRADIENTS)), GRADIENTS.items(), strict=True):
        for name, genome in genomes.items():
            updates = response(genome, gradients)
            axes.plot(range(1, len(gradients) + 1), updates / updates.abs().max().clamp_min(1e-30), label=name)
        axes.set(xlabel="step", title=f"gradient {course}")
        axes.axhline(0, color="gray", linewidth=0.5)
    figure.axes[0].set(ylabel="update, in units of its largest")
    figure.axes[0].legend()
    return png(figure)


def response(genome: Genome, gradients: Sequence[float]) -> torch.Tensor:
    """What a rule takes from a parameter of one element, which stays 0, at each of some steps: float64 [steps].

    Args:
        genome: of the rule.
        gradients: one for each step.
    """
    program = genome.program()
    nothing = torch.zeros(1, dtype=torch.float64)
    slots = dict.fromkeys(program.tensors[2:], nothing)
    updates = []
    for step, gradient in enumerate(gradients, 1):
        inputs = {"param": nothing, "grad": torch.full_like(nothing, gradient), **slots}
        new_param, *new_slots = evaluate(program, inputs, {"lr": 1.0, "t": float(step)})
        slots = dict(zip(slots, new_slots, strict=True))
        updates.append(-new_param)
    return torch.cat(updates)
