"""Making an entry of a zoo from a finished meta-training run or search, and a race or comparison that it took part in."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt import registry
from metaopt.evaluate.race import description
from metaopt.evaluate.report import plain
from metaopt.evaluate.statistics import estimate
from metaopt.meta.config import texts_in
from metaopt.meta.trainer import CONFIG_FILE, METRICS_FILE
from metaopt.objective import Objective
from metaopt.program import ProgramObjective, read_loss
from metaopt.resolve import THETA_FILE, load_theta, read_theta
from metaopt.rule import UpdateRule
from metaopt.suite import suites
from metaopt.zoo.card import CARD_FILE, PAGE_FILE, Card, LossCard, ProgramCard, WeightsCard, render
from metaopt.zoo.entry import LOSS_FILE, RULE_CLASS, RULE_FILE, golden_losses, load_program, verify

INIT_THETA_FILE = "init_theta.safetensors"
"""With which the first run began, where that is of no run."""
CHAMPION_FILE, CHAMPION_RECORD, FUNNEL_RECORD = "champion.py", "champion.json", "funnel.json"
"""What ``metaopt simplify`` leaves in the directory of a search, beside the ``report.json`` of each worker."""
TUNED_RECORD = "tuned.json"
"""What ``metaopt discover rule`` tuned before the search."""
LOSS_SEARCH_FILE, LOSS_REPORT, LOSS_COMPARISON = "worker-0.json", "report.json", "comparison.json"
"""What ``metaopt discover loss`` and ``metaopt discover compare`` leave in their directory."""
LOSS_PICTURES = ("comparison.png", "curves.png")
LOSS_TASK = "preference_noisy_slic_linear"
START_FILE = "start.txt"
"""From which a search began."""
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
    race: Path | str | None = None,
    license: str,
    summary: str,
    limits: str,
    golden_task: str | None = None,
) -> Path:
    """Make an entry of a finished meta-training run, of a search whose champion ``metaopt simplify`` wrote, or of a search for
    losses that ``metaopt discover compare`` compared.

    Args:
        run: its directory. That of a search for rules holds ``champion.py``, which is imported.
        name: of the entry: lower-case letters, digits and underscores.
        into: the directory of entries, of which the entry becomes a subdirectory.
        race: the directory of a race (`metaopt.evaluate.save`) in which the run, or the champion, took part; none of a loss.
        license: of the weights, the program or the loss.
        summary: one line.
        limits: what it was not tried on, and where it is known to fail.
        golden_task: a quick task, whose first losses are recorded for `verify`; by default ``digits_mlp``, of a loss
            ``preference_noisy_slic_linear``.

    Returns:
        The entry's directory; it appears whole or not at all.

    Raises:
        ValueError: a bad name, an entry of that name, a directory that holds no run or no race, a champion that is not what
            the search found, or a race of another rule.
    """
    run, target = Path(run), Path(into) / name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"the name of an entry is made of lower-case letters, digits and underscores, got {name!r}")
    if target.exists():
        raise ValueError(f"{target} is there already; what is published does not change, so choose another name")
    source = _source(run, race)
    golden_task = golden_task or source.task
    content, losses = golden_losses(source.made, golden_task, GOLDEN_SEED, GOLDEN_STEPS)
    card = source.card(
        name=name, summary=summary, license=license, limits=limits,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions={"metaopt": metaopt.__version__, "torch": torch.__version__, "python": platform.python_version()},
        golden={"task": golden_task, "content": content, "seed": GOLDEN_SEED, "losses": losses, "rtol": GOLDEN_RTOL},
        **source.fields,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as parent:
        made = Path(parent) / name
        made.mkdir()
        for file, data in source.files.items():
            (made / file).write_bytes(data)
        text = json.dumps(dataclasses.asdict(card), indent=1, ensure_ascii=False, allow_nan=False)
        (made / CARD_FILE).write_text(f"{text}\n")
        (made / PAGE_FILE).write_text(render(card))
        verify(made)
        shutil.rmtree(made / "__pycache__", ignore_errors=True)
        os.rename(made, target)
    return target


@dataclass(frozen=True)
class _Source:
    """What a run gives an entry.

    Attributes:
        made: the rule or the loss, with its defaults.
        card: its kind.
        fields: of the card, as far as they follow from the run.
        files: name in the entry -> content.
        task: a quick one to try it on.
    """

    made: UpdateRule | Objective
    card: type[Card]
    fields: dict[str, Any]
    files: dict[str, bytes]
    task: str = "digits_mlp"


def _source(run: Path, race: Path | str | None) -> _Source:
    if (run / LOSS_SEARCH_FILE).is_file() and not (run / TUNED_RECORD).is_file():  # proposers search for rules, too
        if race is not None:
            raise ValueError(
                f"{run} is a search for losses, which take part in no race; metaopt discover compare {run}"
            )
        return _of_loss_search(run)
    if race is None:
        raise ValueError(f"give the race that {run} took part in: --race DIRECTORY, which metaopt race --out writes")
    source = _of_search(run) if (run / CHAMPION_FILE).is_file() else _of_meta_training(run)
    assert isinstance(source.made, UpdateRule)
    source.fields["scores"] = scores_of(_read_json(Path(race) / "race.json", "a race"), source.made)
    return source


def _of_loss_search(run: Path) -> _Source:
    report = _read_json(run / LOSS_REPORT, "a finished search for losses")
    compared = _read_json(run / LOSS_COMPARISON, "a search whose winner metaopt discover compare compared")
    winner, config, counts = report["winner"], report["config"], report["counts"]
    labels = [
        name for name, of in compared["contestants"].items() if of["lineage"] and of["program"] == winner["program"]
    ]
    if not labels:
        raise ValueError(f"{run / LOSS_COMPARISON} is not of the search's winner; metaopt discover compare {run} again")
    own = compared["contestants"][labels[0]]
    objective, inputs, hyperparameters = "preference", ["rho"], {"beta": own["beta"]}
    program = read_loss(own["text"], inputs, tuple(hyperparameters))
    regimes = [regime for stage in config["judge"] for regime in stage["regimes"]]
    choices = [{"name": "preference", "options": regime["arguments"]} for regime in regimes]
    shown = f"runs/{run.resolve().name}"
    commands = [
        ["discover", "loss", "--proposer", ",".join(config["proposers"]), "--budget", counts["evaluated"],
         "--batch", config["batch"], "--seed", config["seed"], "--out", shown],
        ["discover", "compare", shown],
    ]  # fmt: skip
    kept = {key: report[key] for key in ("config", "counts", "winner")}
    files = {
        LOSS_FILE: own["text"].encode(),
        LOSS_REPORT: f"{json.dumps(kept, indent=1)}\n".encode(),
        **{name: (run / name).read_bytes() for name in LOSS_PICTURES},
    }
    fields = {
        "sha256": hashlib.sha256(files[LOSS_FILE]).hexdigest(),
        "objective": objective,
        "inputs": inputs,
        "program": own["text"],
        "hyperparameters": hyperparameters,
        "lineage": own["lineage"],
        "command": _commands(commands),
        "seed": config["seed"],
        "device": "cpu",
        "cost": {"proposals": counts["proposed"], "trained_candidates": counts["evaluated"],
                 "seconds": round(counts["seconds"])}
        | ({"tokens": counts["tokens"], "money": counts["cost"]} if counts["tokens"] else {}),
        "tasks": list(dict.fromkeys(_tasks_of(choices))),
        "data": _data_of(choices),
        "scores": {
            "label": labels[0],
            "report": compared["report"],
            "best": compared["best"],
            "contestants": {
                name: plain(
                    {key: of[key] for key in _KEPT} | ({"behind": own["behind"][name]} if name in own["behind"] else {})
                )
                for name, of in compared["contestants"].items()
            },
        },
    }  # fmt: skip
    made = ProgramObjective(program, "preference", tuple(hyperparameters.items()))
    return _Source(made, LossCard, fields, files, LOSS_TASK)


_KEPT = ("beta", "rate", "numbers", "selection", "tried", "edge", "loss", "win_rate", "kl")
"""Of a contestant."""


def _commands(commands: Iterable[Iterable[Any]]) -> str:
    return "\n".join(shlex.join(["metaopt", *map(str, command)]) for command in commands)


def _of_meta_training(run: Path) -> _Source:
    config = _config(run)
    learned, options, theta = read_theta(run)
    if ":" in learned:
        raise ValueError(
            f"an entry must be of a registered learned optimizer, got {learned}; list it in a plugin "
            "(examples/third_party) and meta-train it under that name"
        )
    registry.get("learned_optimizer", learned)
    phases = _phases(run)
    choices = [choice for phase in phases for choice in phase.settings["tasks"]]
    files = {THETA_FILE: (run / THETA_FILE).read_bytes()}
    files |= {phase.file: f"{json.dumps(phase.settings, indent=2)}\n".encode() for phase in phases}
    given = _given_theta(phases[0].run)
    if given is not None:
        files[INIT_THETA_FILE] = given.read_bytes()
    fields = {
        "sha256": hashlib.sha256(files[THETA_FILE]).hexdigest(),
        "learned_optimizer": learned,
        "options": options,
        "meta_parameters": sum(value.numel() for value in theta.values()),
        "command": "\n".join(f"metaopt meta-train --config {phase.file} --out {phase.shown}" for phase in phases),
        "seed": config["seed"],
        "device": config["device"],
        "cost": _cost([phase.run / METRICS_FILE for phase in phases]),
        "tasks": _tasks_of(choices),
        "data": _data_of(choices, [] if given is None else [f"data of {INIT_THETA_FILE}"]),
    }
    return _Source(load_theta(run), WeightsCard, fields, files)


def _of_search(run: Path) -> _Source:
    champion = _read_json(run / CHAMPION_RECORD, "a simplified champion")
    files = {RULE_FILE: (run / CHAMPION_FILE).read_bytes()}
    if hashlib.sha256(files[RULE_FILE]).hexdigest() != champion["sha256"]:
        raise ValueError(
            f"{run / CHAMPION_FILE} is not what metaopt simplify wrote; simplify {run} again, then race it"
        )
    reports = {path.name: _without_folders(path.read_text()) for path in run.glob("report*.json")}
    workers = sorted((json.loads(text) for text in reports.values()), key=lambda report: report["worker"])
    best = [worker["champion"]["text"] for worker in workers]
    through_funnel = (run / FUNNEL_RECORD).is_file()
    if through_funnel:
        files[FUNNEL_RECORD] = (run / FUNNEL_RECORD).read_bytes()
        best = [json.loads(files[FUNNEL_RECORD])["found"]]
    if champion["simplified"] not in best:
        raise ValueError(
            f"{run / CHAMPION_FILE} is not of the best candidate in the search's report or funnel; simplify {run} again, "
            "then race it"
        )
    config, counts = workers[0]["config"], [worker["counts"] for worker in workers]
    # the search tunes it again
    files[START_FILE] = _read_json(run / TUNED_RECORD, "the start of a search for rules")["asked"].encode()
    files[CHAMPION_RECORD] = _without_folders((run / CHAMPION_RECORD).read_text()).encode()
    files |= {name: text.encode() for name, text in reports.items()}
    choices = json.loads(files[CHAMPION_RECORD])["tasks"]
    rule = load_program(run / CHAMPION_FILE)
    shown = f"runs/{run.resolve().name}"
    commands = [*(_search_command(worker, shown) for worker in workers),
                *([["discover", "funnel", shown]] if through_funnel else []),
                ["simplify", shown, "--tolerance", champion["tolerance"]]]  # fmt: skip
    fields = {
        "sha256": champion["sha256"],
        "program": description(rule)["program"],
        "hyperparameters": rule.hp,
        "command": _commands(commands),
        "seed": config["seed"],
        "device": json.loads(config["judge"])["device"],
        "cost": _cost_of_search(counts),
        "tasks": _tasks_of(choices),
        "data": _data_of(choices),
    }  # fmt: skip
    return _Source(rule, ProgramCard, fields, files)


_COUNTED = {
    "children": "children", "proposals": "proposed", "trained_candidates": "unique", "inner_steps": "updates",
    "seconds": "seconds", "tokens": "tokens", "money": "cost",
}  # fmt: skip
"""What cards call what searchers and proposers count; of the latter, ``evaluated`` are the trained candidates."""


def _cost_of_search(counts: list[dict[str, Any]]) -> dict[str, Any]:
    summed = {key: sum(count[key] for count in counts) for key in counts[0]}
    summed |= {"unique": summed["evaluated"]} if "evaluated" in summed else {}
    shown = {name: summed[counted] for name, counted in _COUNTED.items() if counted in summed}
    spent = {name: value for name, value in shown.items() if value or name not in ("tokens", "money")}
    return {name: value if name == "money" else round(value) for name, value in spent.items()}


def _search_command(report: dict[str, Any], out: str) -> list[Any]:
    config, counts = report["config"], report["counts"]
    judge = json.loads(config["judge"])
    if "proposers" in config:
        source = ["--proposer", ",".join(config["proposers"]), "--batch", config["batch"]]
        budget = counts["evaluated"]
    else:
        options = [part for name, value in config["options"].items() for part in ("--set", f"{name}={value}")]
        source, budget = ["--searcher", config["searcher"], *options], counts["children"]
    return [
        "discover", "rule", "--start", START_FILE, "--tasks", judge["asked"], "--judge", judge["judge"],
        "--device", judge["device"], *source, "--seed", config["seed"], "--budget", budget, "--out", out,
        *(["--worker", report["worker"]] if report["worker"] else []),
    ]  # fmt: skip


def _without_folders(text: str) -> str:
    """JSON whose absolute paths, of tasks in a file for example, have lost the folders of the machine that ran it."""
    return re.sub(r'(?<=[",])/(?:[^/",\\]+/)*', "", text)


def scores_of(race: dict[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """What a card keeps of a race.

    Args:
        race: what `metaopt.evaluate.report.as_json` wrote.
        rule: of the run, with its defaults.

    Returns:
        ``label``, the contender that is this rule; ``protocol``, ``versions``, ``ranking``, ``aggregate`` and
        ``against_adamw`` of the race; ``entries[contender][task]`` with ``loss`` (estimate), ``lr`` and ``diverged``; and
        ``differences[contender][task]``, estimates of our normalised score less the contender's, paired by seed.

    Raises:
        ValueError: the rule took no part in the race.
    """
    wanted = plain(description(rule))
    labels = [name for name, described in race["contenders"].items() if described == wanted]
    if not labels:
        raise ValueError(
            f"none of the contenders {', '.join(race['contenders'])} of that race is the rule of the run; "
            f"race it (metaopt race RUN adamw, of a search RUN/{CHAMPION_FILE}:{RULE_CLASS}) and give that race"
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


def _tasks_of(choices: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run trained on: tasks, with their options, and ``suite:NAME`` for the members of a whole suite."""
    left = dict.fromkeys(_described(choice["name"], choice["options"]) for choice in choices)
    short = []
    for suite, names in suites().items():
        if set(names) <= left.keys():
            short.append(f"suite:{suite}")
            left = {name: None for name in left if name not in set(names)}
    return [*short, *left]


def _described(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name


def _data_of(choices: Iterable[Mapping[str, Any]], others: Iterable[str] = ()) -> dict[str, str]:
    """The data sources of these tasks, and others, with their licences."""
    licences = registry.specs("data_source")
    sources = sorted(set(others).union(*(_sources(choice["name"], choice["options"]) for choice in choices)))
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
