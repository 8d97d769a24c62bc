"""A proposer of several, which learns whom to ask."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from metaopt.search.bandit import Bandit
from metaopt.search.proposal import BudgetSpent, Proposal, Proposer, ProposerError, Request

_LOG = logging.getLogger("metaopt")


class Mixture:
    """Several proposers, of which a bandit chooses; where one fails, another is asked.

    Args:
        proposers: of different names.
        bandit: over these names; None: one with its defaults.
        name: of the mixture.
    """

    def __init__(self, proposers: Sequence[Proposer], bandit: Bandit | None = None, name: str = "mixture") -> None:
        self.name = name
        self._proposers = {proposer.name: proposer for proposer in proposers}
        self.bandit = bandit or Bandit([proposer.name for proposer in proposers])
        self._spent: set[str] = set()

    def choose(self, request: Request) -> Request:
        """``request`` with the proposer that shall answer it: what a search writes down before it asks."""
        return dataclasses.replace(request, proposer=self.bandit.choose(self._left()))

    def propose(self, request: Request) -> Proposal:
        """One candidate, of ``request.proposer`` or, where none is named, of whom the bandit chooses.

        Raises:
            ProposerError: all of them failed.
        """
        failed: list[str] = []
        name = request.proposer or self.bandit.choose(self._left())
        while True:
            try:
                return self._proposers[name].propose(request)
            except ProposerError as error:
                failed.append(name)
                if isinstance(error, BudgetSpent):
                    self._spent.add(name)
                else:
                    self.bandit.tell(name, 0.0, 0.0)
                left = [other for other in self._left() if other not in failed]
                if not left:
                    raise
                _LOG.warning("proposer %s failed, another one is asked: %s", name, error)
                name = self.bandit.choose(left)

    def tell(self, request: Request, proposal: Proposal, score: float | None) -> None:
        """What a proposal was worth.

        Args:
            request: what it answers.
            proposal: of this mixture.
            score: the smaller the better; None, or no finite number: it was not valid, or could not be judged.
        """
        parents = [elite.score for elite in request.parents or request.elites]
        improvement = min(parents) - score if parents and score is not None and math.isfinite(score) else 0.0
        self.bandit.tell(proposal.proposer, improvement, proposal.cost)

    def _left(self) -> list[str]:
        return [name for name in self._proposers if name not in self._spent] or list(self._proposers)
