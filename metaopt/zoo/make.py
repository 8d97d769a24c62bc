"""Making an entry of a zoo from a finished meta-training run and a race that it took part in."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt import registry
from metaopt.evaluate.report import plain
from metaopt.evaluate.statistics import estimate
from metaopt.learned import digest
from metaopt.meta.trainer import CONFIG_FILE, METRICS_FILE
from metaopt.resolve import THETA_FILE, load_theta, read_theta
from metaopt.suite import suites
from metaopt.zoo.card import CARD_FILE, PAGE_FILE, Card, render
from metaopt.zoo.entry import golden_losses, verify

GOLDEN_STEPS = 10
GOLDEN_SEED = 0
GOLDEN_RTOL = 1e-3
"""Other machines round differently: two executions here differ by 1e-7 in ten steps, weights that are off by 1 % by 1e-2."""


def add(
    run: Path | str,
    name: str,
    into: Path | str,
    *,
    race: Path | str,
    license: str,
    summary: str,
    limits: str,
    golden_task: str = "digits_mlp",
) -> Path:
    """Make an entry of a finished meta-training run.

    Args:
        run: its directory.
        name: of the entry: lower-case letters, digits and underscores.
        into: the directory of entries, of which the entry becomes a subdirectory.
        race: the directory of a race (`metaopt.evaluate.save`) in which the run took part.
        license: of the weights.
        summary: one line.
        limits: what it was not tried on, and where it is known to fail.
        golden_task: a quick task, whose first losses are recorded for `verify`.

    Returns:
        The entry's directory; it appears whole or not at all.

    Raises:
        ValueError: a bad name, an entry of that name, a directory that holds no run or no race, or a race of other weights.
    """
    run, target = Path(run), Path(into) / name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"the name of an entry is made of lower-case letters, digits and underscores, got {name!r}")
    if target.exists():
        raise ValueError(f"{target} is there already; published weights do not change, so choose another name")
    config = _read_json(run / CONFIG_FILE, "a meta-training run")
    learned, options, theta = read_theta(run)
    registry.get("learned_optimizer", learned)
    rule = load_theta(run)
    content, losses = golden_losses(rule, golden_task, GOLDEN_SEED, GOLDEN_STEPS)
    golden = {"task": golden_task, "content": content, "seed": GOLDEN_SEED, "losses": losses, "rtol": GOLDEN_RTOL}
    tasks = [choice["name"] for choice in config["tasks"]]
    phases = _phases(run)
    card = Card(
        name=name, summary=summary, license=license, limits=limits,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        sha256=hashlib.sha256((run / THETA_FILE).read_bytes()).hexdigest(),
        learned_optimizer=learned, options=options, meta_parameters=sum(value.numel() for value in theta.values()),
        command="\n".join(f"metaopt meta-train --config {file} --out {_shown(out)}" for file, out in phases.items()),
        seed=config["seed"], device=config["device"], cost=_cost([out / METRICS_FILE for out in phases.values()]),
        tasks=_with_suites(tasks), data=_data_of(tasks),
        versions={"metaopt": metaopt.__version__, "torch": torch.__version__, "python": platform.python_version()},
        scores=scores_of(_read_json(Path(race) / "race.json", "a race"), digest(theta)),
        golden=golden,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as parent:
        made = Path(parent) / name
        made.mkdir()
        shutil.copyfile(run / THETA_FILE, made / THETA_FILE)
        for file, out in phases.items():
            (made / file).write_text(json.dumps(_settings(out), indent=2) + "\n")
        text = json.dumps(dataclasses.asdict(card), indent=1, ensure_ascii=False, allow_nan=False)
        (made / CARD_FILE).write_text(f"{text}\n")
        (made / PAGE_FILE).write_text(render(card))
        verify(made)
        os.rename(made, target)
    return target


def scores_of(race: dict[str, Any], theta: str) -> dict[str, Any]:
    """What a card keeps of a race.

    Args:
        race: what `metaopt.evaluate.report.as_json` wrote.
        theta: `metaopt.learned.digest` of the weights.

    Returns:
        ``label``, the contender with these weights; ``protocol``, ``versions``, ``ranking``, ``aggregate`` and
        ``against_adamw`` of the race; ``entries[contender][task]`` with ``loss`` (estimate), ``lr`` and ``diverged``; and
        ``differences[contender][task]``, estimates of our normalised score less the contender's, paired by seed.

    Raises:
        ValueError: the weights took no part in the race.
    """
    labels = [name for name, described in race["contenders"].items() if described.get("theta") == theta]
    if not labels:
        raise ValueError(
            f"none of the contenders {', '.join(race['contenders'])} of that race has the weights of the run; "
            f"race the run's directory (metaopt race RUN adamw) and give that race"
        )
    ours = race["entries"][labels[0]]
    kept = ("protocol", "versions", "ranking", "aggregate", "against_adamw")
    entries = {
        name: {task: {key: entry[key] for key in ("loss", "lr", "diverged")} for task, entry in row.items()}
        for name, row in race["entries"].items()
    }
    differences = {
        name: {task: _paired(ours[task]["scores"], entry["scores"]) for task, entry in row.items()}
        for name, row in race["entries"].items()
        if name != labels[0]
    }
    return {"label": labels[0], **{key: race[key] for key in kept}, "entries": entries, "differences": differences}


def _paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    found = estimate([[a - b for a, b in zip(ours, theirs, strict=True)]])
    return dict(plain(dataclasses.asdict(found)))


def _phases(run: Path) -> dict[str, Path]:
    """The runs by which theta was made, first things first: what an entry calls the config of each -> its directory."""
    runs = [run]
    while (before := _beginning(runs[0])) is not None:
        runs.insert(0, before)
    return {CONFIG_FILE if out is run else f"phase{i}_{CONFIG_FILE}": out for i, out in enumerate(runs, 1)}


def _beginning(run: Path) -> Path | None:
    """The run with whose theta this one began."""
    began = _read_json(run / CONFIG_FILE, "a meta-training run").get("init_theta")
    return None if began is None else Path(began).parent if Path(began).is_file() else Path(began)


def _settings(run: Path) -> dict[str, Any]:
    """The config of a run, without the paths of the machine that ran it."""
    before = _beginning(run)
    moved = {} if before is None else {"init_theta": _shown(before)}
    return _read_json(run / CONFIG_FILE, "a meta-training run") | moved


def _shown(run: Path) -> str:
    return f"runs/{run.name}"


def _cost(metrics: list[Path]) -> dict[str, Any]:
    lines = [json.loads(text) for path in metrics for text in path.read_text().splitlines()]
    known = [key for key in ("inner_steps", "seconds") if all(key in line for line in lines)]
    return {"outer_steps": len(lines), **{key: round(sum(line[key] for line in lines)) for key in known}}


def _with_suites(tasks: list[str]) -> list[str]:
    """``tasks``, with ``suite:NAME`` for the members of each suite that is there as a whole."""
    short, left = [], dict.fromkeys(tasks)
    for suite, names in suites().items():
        if set(names) <= left.keys():
            short.append(f"suite:{suite}")
            left = {name: None for name in left if name not in set(names)}
    return [*short, *left]


def _data_of(tasks: list[str]) -> dict[str, str]:
    """The data sources of named tasks, with their licences."""
    known, licences = registry.specs("task"), registry.specs("data_source")
    named = [known[task].facts.get("data") or "" for task in tasks if task in known]
    sources = sorted({source for names in named for source in names.split(", ") if source})
    return {s: licences[s].facts.get("license", "unknown") if s in licences else "unknown" for s in sources}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no directory of {what}: it holds no {path.name}")
    return dict(json.loads(path.read_text()))
