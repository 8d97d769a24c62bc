"""How good update rules are: the cascade of the program search, with more learning rates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaopt.task import Task
from metaopt_symbolic.cascade import Cascade, Stage
from metaopt_symbolic.genome import Genome
from metaopt_symbolic.proposals.candidate import CandidateScore

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors of a rule's learning rate, of which the best one counts: who writes a rule does not know its rate. Those of
`metaopt_symbolic.cascade.usual_stages` are among them, so what was tuned for these has its fitness here too."""

DIVERGES = 0.2
"""Share of diverged runs from which on the author of a rule is told: at `RATES`, 0 of AdamW's runs diverge and 0.1 of gradient
descent's, but 0.3 to 0.4 of gradient ascent's."""


@dataclass(frozen=True)
class Score(CandidateScore):
    """How good a rule is: minus its fitness in the program search.

    That is the mean normalised validation loss, and 4 more for each stage that was not reached.

    Attributes:
        multiplier: the factor of the learning rate with these losses; where tasks have their own, the median.
        diverged: share of all runs of the stage that diverged, whatever the factor.
    """

    multiplier: float
    diverged: float

    @property
    def fault(self) -> str:
        """That training diverges, if it does."""
        if self.diverged < DIVERGES:
            return ""
        rates = f"{RATES[0]:g} to {RATES[-1]:g} times its own"
        return f"training diverged in {100 * self.diverged:.0f} % of its runs, at learning rates {rates}"


class Judge:
    """Scores genomes by a `Cascade` whose stages try all `RATES`.

    Args:
        tasks: as of `Cascade`.
        stages: of it, their multipliers aside.
    """

    def __init__(self, tasks: Mapping[str, Task], stages: Sequence[Stage]) -> None:
        self._cascade = Cascade(tasks, [dataclasses.replace(stage, multipliers=RATES) for stage in stages])

    @property
    def stages(self) -> Sequence[Stage]:
        """Of the cascade."""
        return self._cascade.stages

    def scores(self, candidates: Sequence[Genome]) -> list[Score]:
        """One score per rule."""
        scores = self._cascade.scores([genome.program() for genome in candidates])
        return [Score(-s.fitness, s.stage, s.losses, s.multiplier, s.diverged) for s in scores]

    def state(self) -> dict[str, Any]:
        """See `Cascade.state`."""
        return self._cascade.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Cascade.restore`."""
        self._cascade.restore(state)


def describe(judge: str) -> str:
    """`metaopt_symbolic.report.describe` of the stages, and that `RATES` are tried."""
    return json.dumps({**json.loads(judge), "rates": RATES})
