"""From a finished search to the file of a rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metaopt.resolve import hashable
from metaopt.search import Archive
from metaopt_symbolic.cascade import Cascade, Stage
from metaopt_symbolic.genome import parse
from metaopt_symbolic.rule_file import write_rule_file
from metaopt_symbolic.search import STUDY
from metaopt_symbolic.simplify import Simplified, simplify
from metaopt_symbolic.suites import search_tasks

NAME = "Champion"
"""Of the class."""


def write_champion(
    directory: Path, *, tolerance: float, storage: str | None = None, evolution: int = 64
) -> tuple[Simplified, Path]:
    """Simplify the best elite of the search in ``directory``, by its last stage, and write it as ``champion.py`` there.

    Args:
        directory: of the search.
        tolerance: see `simplify`.
        storage: of its archive, if that is elsewhere.
        evolution: see `simplify`.

    Raises:
        ValueError: there is no search, or its tasks have changed since.
    """
    archive = Archive(directory, STUDY, None, storage)
    elites = archive.elites()
    if not elites:
        raise ValueError(f"the search in {directory} has no champion yet; give it more time")
    judge = json.loads(archive.settings["judge"])
    best = elites[0]
    last: dict[str, Any] = {key: hashable(value) for key, value in judge["stages"][-1].items()}
    found = simplify(
        parse(best.text),
        Cascade(search_tasks(judge["asked"]), [Stage(**last)]).scores,
        tolerance=tolerance,
        evolution=evolution,
    )
    origin = f"Found by program search ({archive.settings['searcher']}, generation {best.generation}), then simplified."
    return found, write_rule_file(found.genome, directory / "champion.py", NAME, origin)
