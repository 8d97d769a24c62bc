"""What the search for one piece of a formula goes on from, where a distillation was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaopt.files import write_atomic
from metaopt_symbolic.genome import Genome, from_json
from metaopt_symbolic.search import Counts


@dataclass(frozen=True)
class Checkpoint:
    """A search between two generations.

    Attributes:
        start: the program that evolution began with.
        error: of it.
        front: programs and their errors.
        known: errors by structure.
        counts: what was done.
        rng: state of the random numbers.
        searcher: state of the evolution.
    """

    start: Genome
    error: float
    front: tuple[tuple[Genome, float], ...]
    known: Mapping[int, float]
    counts: Counts
    rng: Mapping[str, Any]
    searcher: Mapping[str, NDArray[Any]]

    def save(self, file: Path, key: str) -> None:
        """Write all of it, or nothing; ``key`` is that of the search."""
        facts = {
            "key": key,
            "start": self.start.to_json(),
            "error": self.error,
            "front": [[genome.to_json(), error] for genome, error in self.front],
            "counts": dataclasses.asdict(self.counts),
            "rng": self.rng,
        }
        arrays = {
            "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
            "known": np.array([*self.known], np.uint64),
            "errors": np.array([*self.known.values()]),
            **{f"searcher.{name}": value for name, value in self.searcher.items()},
        }
        write_atomic(file, lambda path: np.savez_compressed(path, **arrays))  # type: ignore[arg-type]


def search_key(wanted: NDArray[np.float64], functions: str, seed: int) -> str:
    """Of a search: equal ones go on with each other."""
    return hashlib.sha256(wanted.tobytes() + json.dumps([functions, seed]).encode()).hexdigest()


def load(file: Path, key: str) -> Checkpoint | None:
    """What was saved under this key; None where there is nothing.

    Raises:
        ValueError: the search of another target, or with another seed.
    """
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    facts = json.loads(arrays["facts"].tobytes())
    if facts["key"] != key:
        raise ValueError(
            f"{file} is of a distillation that was stopped, of another target, seed or tasks; give the same to go on with it, "
            f"choose another directory, or delete the file"
        )
    prefix = "searcher."
    return Checkpoint(
        from_json(facts["start"]),
        facts["error"],
        tuple((from_json(genome), error) for genome, error in facts["front"]),
        dict(zip(arrays["known"].tolist(), arrays["errors"].tolist(), strict=True)),
        Counts(**facts["counts"]),
        facts["rng"],
        {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)},
    )
