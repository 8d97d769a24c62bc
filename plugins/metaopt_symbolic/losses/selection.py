"""The winner of a search for losses: the best of its elites where nothing was searched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metaopt_symbolic.losses.candidate import objective
from metaopt_symbolic.losses.judge import Judge, Score, Stage
from metaopt_symbolic.proposals.candidate import Candidate

ELITES = 12
"""Of how many the winner is selected."""


@dataclass(frozen=True)
class Selected:
    """The winner among the elites of a search, on tasks that the search has not seen.

    Attributes:
        candidate: of the least mean there.
        losses: means there, by number, of all that took part.
        scale, rate: the setting of the winner there.
    """

    candidate: Candidate[Score]
    losses: Mapping[int, float]
    scale: float
    rate: float


def select(candidates: Sequence[Candidate[Score]], judge: Judge, stage: Stage, most: int = ELITES) -> Selected:
    """The best of the ``most`` best candidates on another stage: who was only lucky in the search is not chosen."""
    elites = sorted(candidates, key=lambda candidate: candidate.score.loss)[:most]
    scores = judge.scores_on(stage, [objective(elite.genome) for elite in elites])
    losses = {elite.number: score.loss for elite, score in zip(elites, scores, strict=True)}
    k = min(range(len(elites)), key=lambda k: scores[k].loss if math.isfinite(scores[k].loss) else math.inf)
    return Selected(elites[k], losses, scores[k].scale, scores[k].rate)
