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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt import registry
from metaopt.evaluate.report import plain
from metaopt.evaluate.statistics import estimate
from metaopt.learned import digest
from metaopt.meta.config import texts_in
from metaopt.meta.trainer import CONFIG_FILE, METRICS_FILE
from metaopt.resolve import THETA_FILE, load_theta, read_theta
from metaopt.suite import suites
from metaopt.zoo.card import CARD_FILE, PAGE_FILE, Card, render
from metaopt.zoo.entry import golden_losses, verify

INIT_THETA_FILE = "init_theta.safetensors"
"""With which the first run began, where that is of no run."""
UNKNOWN = "unknown"
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
    config = _config(run)
    learned, options, theta = read_theta(run)
    if ":" in learned:
        raise ValueError(
            f"an entry must be of a registered learned optimizer, got {learned}; list it in a plugin "
            "(examples/third_party) and meta-train it under that name"
        )
    registry.get("learned_optimizer", learned)
    rule = load_theta(run)
    content, losses = golden_losses(rule, golden_task, GOLDEN_SEED, GOLDEN_STEPS)
    golden = {"task": golden_task, "content": content, "seed": GOLDEN_SEED, "losses": losses, "rtol": GOLDEN_RTOL}
    phases = _phases(run)
    card = Card(
        name=name, summary=summary, license=license, limits=limits,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        sha256=hashlib.sha256((run / THETA_FILE).read_bytes()).hexdigest(),
        learned_optimizer=learned, options=options, meta_parameters=sum(value.numel() for value in theta.values()),
        command="\n".join(f"metaopt meta-train --config {phase.file} --out {phase.shown}" for phase in phases),
        seed=config["seed"], device=config["device"], cost=_cost([phase.run / METRICS_FILE for phase in phases]),
        tasks=_tasks_of(phases), data=_data_of(phases),
        versions={"metaopt": metaopt.__version__, "torch": torch.__version__, "python": platform.python_version()},
        scores=scores_of(_read_json(Path(race) / "race.json", "a race"), digest(theta)),
        golden=golden,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as parent:
        made = Path(parent) / name
        made.mkdir()
        shutil.copyfile(run / THETA_FILE, made / THETA_FILE)
        for phase in phases:
            (made / phase.file).write_text(json.dumps(phase.settings, indent=2) + "\n")
        if (given := _given_theta(phases[0].run)) is not None:
            shutil.copyfile(given, made / INIT_THETA_FILE)
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


@dataclass(frozen=True)
class _Phase:
    """One of the runs by which theta was made.

    Attributes:
        run: its directory.
        file: what an entry calls its config.
        shown: what an entry calls its directory.
        settings: its config, without the paths of the machine that ran it.
    """

    run: Path
    file: str
    shown: str
    settings: dict[str, Any]


def _phases(run: Path) -> list[_Phase]:
    """First things first."""
    runs = [run.resolve()]
    while (before := _run_before(runs[0])) is not None:
        runs.insert(0, before)
    names = [out.name for out in runs]
    phases: list[_Phase] = []
    for i, out in enumerate(runs, 1):
        settings = _config(out)
        if phases:
            settings["init_theta"] = phases[-1].shown
        elif settings.get("init_theta") is not None:
            settings["init_theta"] = INIT_THETA_FILE
        file = CONFIG_FILE if i == len(runs) else f"phase{i}_{CONFIG_FILE}"
        shown = f"runs/{out.name}" if names.count(out.name) == 1 else f"runs/phase{i}_{out.name}"
        phases.append(_Phase(out, file, shown, settings))
    return phases


def _run_before(run: Path) -> Path | None:
    """The run with whose theta this one began."""
    began = _config(run).get("init_theta")
    if began is None or _given_theta(run) is not None:
        return None
    return (Path(began).parent if Path(began).is_file() else Path(began)).resolve()


def _given_theta(run: Path) -> Path | None:
    """The file with whose theta a run began, where that is of no other run: imported weights, for example."""
    began = Path(_config(run).get("init_theta") or run)
    return began if began.is_file() and not (began.parent / CONFIG_FILE).is_file() else None


def _config(run: Path) -> dict[str, Any]:
    return _read_json(run / CONFIG_FILE, "a meta-training run")


def _cost(metrics: list[Path]) -> dict[str, Any]:
    lines = [json.loads(text) for path in metrics for text in path.read_text().splitlines()]
    known = [key for key in ("inner_steps", "seconds") if all(key in line for line in lines)]
    return {"outer_steps": len(lines), **{key: round(sum(line[key] for line in lines)) for key in known}}


def _tasks_of(phases: list[_Phase]) -> list[str]:
    """What the phases trained on: tasks, with their options, and ``suite:NAME`` for the members of a whole suite."""
    choices = [choice for phase in phases for choice in phase.settings["tasks"]]
    left = dict.fromkeys(_described(choice["name"], choice["options"]) for choice in choices)
    short = []
    for suite, names in suites().items():
        if set(names) <= left.keys():
            short.append(f"suite:{suite}")
            left = {name: None for name in left if name not in set(names)}
    return [*short, *left]


def _described(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name


def _data_of(phases: list[_Phase]) -> dict[str, str]:
    """The data sources that the phases trained on, with their licences."""
    found = [_sources(choice["name"], choice["options"]) for phase in phases for choice in phase.settings["tasks"]]
    if _given_theta(phases[0].run) is not None:
        found.append({f"data of {INIT_THETA_FILE}"})
    licences = registry.specs("data_source")
    sources = sorted(set().union(*found))
    return {s: licences[s].facts.get("license", UNKNOWN) if s in licences else UNKNOWN for s in sources}


def _sources(name: str, options: Mapping[str, Any]) -> set[str]:
    """The data sources of a task: as its options say (of a task inside, too), else as is known of it or of its family."""
    known = registry.specs("task")
    defaults, facts = (known[name].defaults, known[name].facts) if name in known else ({}, {})
    for arguments in (options, {} if "data" in facts else defaults):
        data, tasks = texts_in(arguments, "data"), texts_in(arguments, "task")
        if data or tasks:
            return set(data).union(*(_sources(task, {}) for task in tasks))
    members = [spec.facts["data"] for spec in known.values() if spec.facts.get("family") == name]
    told = [facts["data"]] if "data" in facts else members or [f"data of {name}"]
    return {source for sources in told for source in sources.split(", ") if source}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no directory of {what}: it holds no {path.name}")
    return dict(json.loads(path.read_text()))
