"""What a search asks of a proposer, and what it gets: texts of candidates, whoever writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from metaopt.search.archive import Elite

Validator = Callable[[str], str | None]
"""Source of a candidate -> what is wrong with it, in words that help to mend it; None: nothing."""


@dataclass(frozen=True)
class Request:
    """What is asked.

    A search that writes a request down (`to_json`) before it hands it out can ask the same again after a crash, and gets the
    answers that it has paid for.

    Attributes:
        number: of the request in its search; equal requests of other numbers get other answers.
        goal: what the candidates are for, and how they are judged, in words.
        elites: a sample of the archive; ``facts["name"]`` is what a candidate is called, else its digest.
        parents: those of the elites to start from.
        notes: what happened to earlier candidates: error texts, divergences, what a judge saw.
        longest: statements that a candidate should have at most; None: any number.
        proposer: who shall answer, in a mixture; empty: whom the mixture chooses.
    """

    number: int
    goal: str
    elites: tuple[Elite, ...] = ()
    parents: tuple[Elite, ...] = ()
    notes: tuple[str, ...] = ()
    longest: int | None = None
    proposer: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """The request that `to_json` was given."""
        elites = {
            name: tuple(Elite(**{**elite, "parents": tuple(elite["parents"])}) for elite in data[name])
            for name in ("elites", "parents")
        }
        return cls(**{**data, **elites, "notes": tuple(data["notes"])})


@dataclass(frozen=True)
class Proposal:
    """A candidate, or what came instead of one.

    Attributes:
        source: text of the candidate; the last text that was tried where ``error`` is given.
        name: what its author calls it.
        thought: why, in its author's words.
        proposer, model: who made it.
        tokens: of both directions, repairs included.
        cost: money, likewise.
        error: why ``source`` is not valid; empty: it is.
        unreadable: whether there was no candidate in the answer, so that ``source`` is the answer.
    """

    source: str
    name: str
    thought: str
    proposer: str
    model: str = ""
    tokens: int = 0
    cost: float = 0.0
    error: str = ""
    unreadable: bool = False


class ProposerError(RuntimeError):
    """A proposer cannot answer, now or any more; the message says why."""


class BudgetSpent(ProposerError):
    """A call was not made, because it might have cost more than is left."""


class Proposer(Protocol):
    """A source of candidates."""

    @property
    def name(self) -> str:
        """By which a mixture and an archive know it."""

    def propose(self, request: Request) -> Proposal:
        """One candidate; safe to be called by several threads.

        Raises:
            ProposerError: there is none.
        """
