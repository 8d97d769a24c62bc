"""What a user may type where a search's start is wanted."""

from __future__ import annotations

from pathlib import Path

from metaopt import registry
from metaopt.program import TraceError
from metaopt.rule import ElementwiseRule
from metaopt_symbolic.genome import SEEDS, from_rule, parse


def start_text(name: str) -> str:
    """The text of the program ``name``: one of `SEEDS`, a file with such a text, or a registered rule that is a program.

    Raises:
        ValueError: none of these.
    """
    if name in SEEDS:
        return SEEDS[name]
    if Path(name).suffix == ".txt":
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name} to start from")
        return parse(Path(name).read_text()).text()
    rule = registry.create("optimizer", name)
    if not isinstance(rule, ElementwiseRule):
        raise ValueError(f"{name} is no program: only rules of elementwise text are; start from {', '.join(SEEDS)}")
    try:
        return from_rule(rule).text()
    except TraceError as error:
        raise ValueError(f"{name} is no program: {error}") from None
