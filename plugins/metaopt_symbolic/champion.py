"""From a finished search to the file of a rule."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaopt.files import write_atomic
from metaopt.resolve import hashable
from metaopt.search import Archive
from metaopt_symbolic.cascade import Cascade, Stage
from metaopt_symbolic.funnel import tuned, with_decay
from metaopt_symbolic.genome import parse
from metaopt_symbolic.rule_file import write_rule_file
from metaopt_symbolic.search import STUDY
from metaopt_symbolic.simplify import Simplified, simplify
from metaopt_symbolic.suites import search_tasks, task_choices

NAME = "Champion"
"""Of the class."""

FUNNEL_FILE = "funnel.json"
"""What `metaopt_symbolic.funnel` found."""


def write_champion(
    directory: Path, *, tolerance: float, storage: str | None = None, evolution: int = 64
) -> tuple[Simplified, Path]:
    """Simplify the champion of the search in ``directory``, by its last stage, and write it as ``champion.py`` there.

    The champion is that of the funnel, if there was one, with the weight decay that it had there, else the best elite.

    What ``metaopt zoo add`` needs to know of it is in ``champion.json``: the text that was simplified, how, the tasks of the
    search as registered tasks and their options, and the sha256 of ``champion.py``.

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
    champion = tuned(best)
    who = archive.settings.get("searcher") or ", ".join(archive.settings["proposers"])
    origin = f"Found by program search ({who}, generation {best.generation}), then simplified."
    if (directory / FUNNEL_FILE).is_file():
        champion = parse(json.loads((directory / FUNNEL_FILE).read_text())["found"])
        origin = f"Found by program search ({who}) and a funnel, then simplified."
    last: dict[str, Any] = {key: hashable(value) for key, value in judge["stages"][-1].items()}
    scores = Cascade(search_tasks(judge["asked"]), [Stage(**last)]).scores
    found = simplify(champion, scores, tolerance=tolerance, evolution=evolution)
    if (directory / FUNNEL_FILE).is_file():  # not simplified away where searched runs do not overfit
        found = replace(found, genome=with_decay(found.genome))
    path = write_rule_file(found.genome, directory / "champion.py", NAME, origin)
    facts = {
        "simplified": champion.text(),
        "tolerance": tolerance,
        "before": found.before,
        "after": found.after,
        "log": found.log,
        "tasks": task_choices(judge["asked"]),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    write_atomic(directory / "champion.json", json.dumps(facts, indent=1) + "\n")
    return found, path
