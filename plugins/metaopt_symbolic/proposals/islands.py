"""Which candidates become parents: islands that evolve apart, and clusters of candidates that score alike.

As in FunSearch (Romera-Paredes et al., 2024, https://doi.org/10.1038/s41586-023-06924-6): a parent is drawn from a cluster,
which is drawn by its score, and there by its length; now and then the worse half of the islands begins again with a founder
from the better half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Member:
    """A candidate, as far as its chances matter.

    Attributes:
        score: the smaller the better.
        scores: by task.
        length: statements.
    """

    score: float
    scores: Mapping[str, float]
    length: int


class Islands:
    """Numbers of candidates, island by island.

    Args:
        count: of islands, at least 1.
        temperature: of the softmax over clusters, in units of the score.
        resolution: scores by task that differ by less belong to one cluster: about the noise of a score.
        reset_every: candidates between two resets; 0: never.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, count: int = 4, temperature: float = 0.02, resolution: float = 0.02, reset_every: int = 200
    ) -> None:
        if count < 1 or not temperature > 0 or not resolution > 0 or reset_every < 0:
            raise ValueError(
                f"count must be at least 1, temperature and resolution above 0 and reset_every at least 0, got {count}, "
                f"{temperature}, {resolution} and {reset_every}"
            )
        self._temperature, self._resolution, self._reset_every = temperature, resolution, reset_every
        self._members: list[list[int]] = [[] for _ in range(count)]
        self._added = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, number: int, island: int | None, members: Sequence[Member]) -> None:
        """Take candidate ``number`` in, on one island or, as a founder, on all.

        Args:
            number: of the candidate.
            island: where its parents live.
            members: all candidates by number, this one included.
        """
        for k in range(len(self)) if island is None else [island]:
            self._members[k].append(number)
        self._added += 1
        if self._reset_every and self._added % self._reset_every == 0:
            self._reset(members)

    def parents(self, island: int, count: int, members: Sequence[Member], rng: np.random.Generator) -> tuple[int, ...]:
        """``count`` candidates of an island, or as many as it has, from different clusters where there are so many."""
        clusters: dict[tuple[int, ...], list[int]] = {}
        for number in self._members[island]:
            clusters.setdefault(self._signature(members[number]), []).append(number)
        scores = [min(members[number].score for number in cluster) for cluster in clusters.values()]
        chances = _softmax(-np.array(scores) / self._temperature)
        drawn = rng.choice(len(scores), size=min(count, len(scores)), replace=False, p=chances)
        return tuple(self._of([*clusters.values()][k], members, rng) for k in drawn)

    def state(self) -> dict[str, object]:
        """What `restore` takes, as JSON holds it."""
        return {"members": [[*numbers] for numbers in self._members], "added": self._added}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on as the islands whose `state` this is."""
        self._members, self._added = state["members"], state["added"]  # type: ignore[assignment]

    def _signature(self, member: Member) -> tuple[int, ...]:
        return tuple(round(score / self._resolution) for score in member.scores.values())

    def _of(self, cluster: Sequence[int], members: Sequence[Member], rng: np.random.Generator) -> int:
        """Short ones rather than long ones."""
        lengths = np.array([members[number].length for number in cluster], float)
        spread = (lengths - lengths.min()) / (lengths.max() - lengths.min() + 1e-6)
        return int(rng.choice(cluster, p=_softmax(-spread)))

    def _reset(self, members: Sequence[Member]) -> None:
        def best(island: int) -> int:
            return min(self._members[island], key=lambda number: members[number].score, default=0)

        order = sorted(range(len(self)), key=lambda island: members[best(island)].score)
        kept = math.ceil(len(self) / 2)
        for k, island in enumerate(order[kept:]):
            self._members[island] = [best(order[k % kept])]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max()) + 1e-12  # drawing without replacement wants chances above 0
    return e / e.sum()
