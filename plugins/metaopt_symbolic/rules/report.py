"""The champion of a search for rules by proposers, and pictures of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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

STEPS = (1, 10, 100)
"""Updates with the same gradient, of pictures."""


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
    """Picture of updates by the gradient: of one element that is 0, after so many `STEPS` with that gradient, at lr = 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(STEPS)), STEPS, strict=True):
        for name, genome in genomes.items():
            gradients, update = response(genome, steps)
            axes.plot(gradients, update / update.abs().max().clamp_min(1e-30), label=name)
        axes.set(xlabel="gradient", xscale="symlog", title=f"step {steps}")
        axes.axhline(0, color="gray", linewidth=0.5)
        if steps == STEPS[0]:
            axes.set(ylabel="update, in units of its largest")
            axes.legend()
    return png(figure)


def response(genome: Genome, steps: int, points: int = 61) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients from -3 to 3, and what a parameter of one element, 0, loses in the last of ``steps`` updates with each of them.

    Returns:
        Both float64 [points].
    """
    program = genome.program()
    gradients = torch.linspace(-3, 3, points, dtype=torch.float64)
    updates = []
    for gradient in gradients[:, None]:  # one by one: a rule may read the norm of a tensor
        slots = {name: torch.zeros(1, dtype=torch.float64) for name in program.tensors[2:]}
        param = torch.zeros(1, dtype=torch.float64)
        for step in range(1, steps + 1):
            inputs = {"param": torch.zeros_like(param), "grad": gradient, **slots}
            param, *new = evaluate(program, inputs, {"lr": 1.0, "t": float(step)})
            slots = dict(zip(slots, new, strict=True))
        updates.append(-param)
    return gradients, torch.cat(updates)
