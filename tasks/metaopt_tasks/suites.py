"""The suite as the registry sees it: families and their named members, read from ``suite/*.toml``. Imports no torch.

One file per family::

    factory = "metaopt_tasks.mlp:mlp_classifier"   # makes a member; takes name, device and the arguments below
    summary = "MLP classifiers of images and tables"
    tags = ["classification"]
    paper = ""                                     # optional
    extra = ""                                     # optional: the extra that its imports need; its data's is known
    family = "module:Class"                        # optional: a TaskFamily of its own; else one is made from [ranges]

    [ranges]                                       # what a sampled member draws: lists, or {low, high} (log-uniform)
    hidden = [[16], [32], [64, 64]]

    [members]                                      # named, fixed tasks: a suite, and arguments of the factory
    digits_mlp = { suite = "fast", data = "digits", hidden = [32] }

What was measured of each member (parameters, bytes, time per step, content hash) is in ``lock.json`` beside them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from metaopt.hookspecs import Spec
from metaopt_tasks.data.catalogue import SOURCES

SUITES = ("fast", "train", "valid", "test", "large")
FOLDER = Path(__file__).parent / "suite"
LOCK = FOLDER / "lock.json"
BASELINE = FOLDER / "adamw.jsonl"
"""Tuned AdamW's curves, written by ``metaopt baseline``."""
_DATA_EXTRAS = {source.name: source.extra for source in SOURCES}


def task_specs() -> list[Spec]:
    """A spec for every family and every named member."""
    return [spec for path in sorted(FOLDER.glob("*.toml")) for spec in _specs_of(path.stem, path)]


@cache
def lock() -> dict[str, Any]:
    """What was measured: ``{"tasks": {name: facts}, ...}``; empty before the first measurement."""
    return json.loads(LOCK.read_text()) if LOCK.is_file() else {"tasks": {}}


def _specs_of(family: str, path: Path) -> Iterator[Spec]:
    declared = tomllib.loads(path.read_text())
    factory, summary = declared["factory"], declared["summary"]
    paper, extra = declared.get("paper", ""), declared.get("extra", "")
    tags = tuple(declared.get("tags", ()))
    if "family" in declared:
        yield Spec(family, declared["family"], summary, ("family", *tags), paper, extra=extra)
    else:
        defaults = {"name": family, "factory": factory, "ranges": declared["ranges"]}
        sampled = "metaopt_tasks.family:SampledFamily"
        yield Spec(family, sampled, summary, ("family", *tags), paper, defaults, extra)
    for name, arguments in declared["members"].items():
        arguments = {"name": name} | {key: _frozen(value) for key, value in arguments.items()}
        suite = arguments.pop("suite")
        if suite not in SUITES:
            raise ValueError(f"suite of {name!r} must be one of {', '.join(SUITES)}, got {suite!r}")
        data = arguments.get("data", "")
        facts = {"family": family, "suite": suite, "data": data} | lock()["tasks"].get(name, {})
        if BASELINE.is_file():
            facts["baseline"] = str(BASELINE)
        needs = extra or _DATA_EXTRAS.get(data, "")
        yield Spec(name, factory, _summary(arguments), tags, paper, arguments, needs, facts)


def _summary(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in arguments.items() if key not in ("name", "seed"))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
