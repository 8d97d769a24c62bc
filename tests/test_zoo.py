"""A zoo: entries are made whole or not at all, found through plugins, used by name, and caught when they change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt
from metaopt import registry
from metaopt.cli import main
from metaopt.evaluate import race, save
from metaopt.evaluate.race import description
from metaopt.hookspecs import Spec, hookimpl
from metaopt.learned import BoundRule, LearnedRule, digest
from metaopt.meta.config import MetaTrainConfig, make_config, read_settings
from metaopt.program import parse_program
from metaopt.resolve import THETA_FILE, load_theta, resolve_rule, save_theta
from metaopt.rule import ElementwiseRule
from metaopt.suite import content_hash
from metaopt.task import Task
from metaopt.zoo import CARD_FILE, ProgramCard, entries, read_card, render
from metaopt.zoo.entry import load, verify
from metaopt.zoo.make import GOLDEN_RTOL, add, scores_of
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_symbolic.suites import task_choices, tasks_of

SETTINGS = MetaTrainConfig(learned="small_fc_lopt", tasks=("digits_mlp", "digits_conv"), seed=3)
CONFIG = json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
TOLD = {"license": "Apache-2.0", "summary": "a tiny one", "limits": "Only ten steps of one task."}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What meta-training leaves behind."""
    directory = tmp_path_factory.mktemp("run")
    learned = AdafacMLP(step_scale=0.01)
    theta = learned.init_theta(torch.Generator().manual_seed(0))
    save_theta(directory / THETA_FILE, "small_fc_lopt", learned, theta)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    lines = [{"step": i, "meta_loss": 1.0, "inner_steps": 320, "seconds": 0.5} for i in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture(scope="module")
def raced(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("race")
    contenders = {"mine": str(run), "adamw": "adamw", "fresh": _another()}
    save(race(contenders, ["digits_mlp"], seeds=3, steps=5, grid=0, progress=False), directory)
    return directory


@pytest.fixture(scope="module")
def zoo(run: Path, raced: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stranger's zoo of one entry, ``tiny``, whose plugin is installed."""
    directory = tmp_path_factory.mktemp("zoo")
    add(run, "tiny", directory, race=raced, **TOLD)

    class Plugin:
        @hookimpl
        def metaopt_zoo_rules(self) -> list[Spec]:
            return entries(directory)

    with pytest.MonkeyPatch.context() as patch:
        found = registry.Registry.discover()
        found.register(Plugin(), "strangers")
        patch.setattr(registry, "default", lambda: found)
        yield directory


def _another() -> BoundRule:
    learned = AdafacMLP(step_scale=0.01)
    return learned.bind(learned.init_theta(torch.Generator().manual_seed(1)))


def _changed(zoo: Path, tmp_path: Path, **fields: Any) -> Path:
    """A copy of the entry with some fields of its card changed; None removes one. Its page follows."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in (zoo / "tiny").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    card = {**json.loads((copy / CARD_FILE).read_text()), **fields}
    (copy / CARD_FILE).write_text(json.dumps({name: value for name, value in card.items() if value is not None}))
    return copy


# --- made -------------------------------------------------------------------------------------------------------------


def test_an_entry_says_how_it_was_made(zoo: Path, run: Path) -> None:
    card = read_card(zoo / "tiny")
    assert (card.learned_optimizer, card.options["step_scale"], card.options["hidden"]) == ("small_fc_lopt", 0.01, 4)
    assert card.meta_parameters == sum(value.numel() for value in load_theta(run).theta.values()) == 197
    assert (card.seed, card.device, card.tasks) == (3, "cpu", ["digits_mlp", "digits_conv"])
    assert card.cost == {"outer_steps": 3, "inner_steps": 960, "seconds": 2}
    assert card.versions["torch"] == torch.__version__
    assert "BSD" in card.data["digits"] or "CC" in card.data["digits"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", card.created)
    assert card.command == f"metaopt meta-train --config config.json --out runs/{run.name}"
    assert make_config(read_settings(zoo / "tiny" / "config.json")) == SETTINGS, "what the command reads"
    assert hashlib.sha256((zoo / "tiny" / THETA_FILE).read_bytes()).hexdigest() == card.sha256


def test_a_run_that_began_with_another_brings_it_along(run: Path, raced: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    for file in (THETA_FILE, "metrics.jsonl"):
        (second / file).write_bytes((run / file).read_bytes())
    (second / "config.json").write_text(json.dumps({**CONFIG, "seed": 4, "init_theta": str(run)}))
    made = add(second, "two_phases", tmp_path / "zoo", race=raced, **TOLD)
    card = read_card(made)
    first, last = card.command.splitlines()
    assert first == f"metaopt meta-train --config phase1_config.json --out runs/{run.name}"
    assert last == "metaopt meta-train --config config.json --out runs/second"
    assert json.loads((made / "phase1_config.json").read_text()) == CONFIG
    config = json.loads((made / "config.json").read_text())
    assert config["init_theta"] == f"runs/{run.name}", "where the first command leaves it, not where it was here"
    assert (card.seed, card.cost["outer_steps"]) == (4, 6)


def _phase(directory: Path, run: Path, **settings: Any) -> Path:
    """A run like ``run``, with other settings."""
    directory.mkdir(parents=True)
    for file in (THETA_FILE, "metrics.jsonl"):
        (directory / file).write_bytes((run / file).read_bytes())
    settings = dataclasses.asdict(dataclasses.replace(SETTINGS, **settings))
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def test_a_card_names_the_data_of_all_phases_and_says_where_they_are_not_known(
    run: Path, raced: Path, tmp_path: Path
) -> None:
    imported = tmp_path / "imported.safetensors"
    imported.write_bytes((run / THETA_FILE).read_bytes())
    first = _phase(tmp_path / "a" / "x", run, tasks=("suite:fast", "mine.py:secret"), init_theta=str(imported))
    wrapped = {"name": "rescaled", "options": {"task": "wine_mlp", "options": {"data": "iris"}}}
    second = _phase(tmp_path / "b" / "x", run, tasks=(wrapped, "quadratic"), init_theta=str(first))
    made = add(second, "two", tmp_path / "zoo", race=raced, **TOLD)
    card = read_card(made)
    assert {"digits", "textures8", "shapes8", "wine", "iris"} <= card.data.keys()
    assert card.data["data of mine.py:secret"] == card.data["data of init_theta.safetensors"] == "unknown"
    known = {name for name in card.data if not name.startswith("data of")}
    assert "unknown" not in {card.data[name] for name in known}
    assert card.tasks[:2] == ["suite:fast", "mine.py:secret"]
    assert card.tasks[2:] == ["rescaled(task='wine_mlp', options={'data': 'iris'})", "quadratic"]
    assert [line.partition("--out ")[2] for line in card.command.splitlines()] == ["runs/phase1_x", "runs/phase2_x"]
    configs = [json.loads((made / file).read_text()) for file in ("phase1_config.json", "config.json")]
    assert [config["init_theta"] for config in configs] == ["init_theta.safetensors", "runs/phase1_x"]
    assert (made / "init_theta.safetensors").read_bytes() == imported.read_bytes()


def test_an_entry_keeps_the_race_with_intervals(zoo: Path, raced: Path) -> None:
    scores = read_card(zoo / "tiny").scores
    whole = json.loads((raced / "race.json").read_text())
    assert scores["label"] == "mine", "found by its weights, not by its name"
    for name in ("mine", "adamw", "fresh"):
        assert scores["entries"][name]["digits_mlp"]["loss"] == whole["entries"][name]["digits_mlp"]["loss"]
        assert scores["aggregate"][name] == whole["aggregate"][name]
    ours, theirs = (whole["entries"][name]["digits_mlp"]["scores"] for name in ("mine", "adamw"))
    found = scores["differences"]["adamw"]["digits_mlp"]
    assert found["iqm"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3, rel=1e-6), "of three numbers: their mean"
    assert found["low"] < found["iqm"] < found["high"] and "mine" not in scores["differences"]


def test_wins_are_the_intervals_that_exclude_zero(zoo: Path) -> None:
    card = read_card(zoo / "tiny")
    intervals = {"a": (-3.0, -1.0), "b": (-2.0, 0.5), "c": (0.1, 0.2), "d": (-0.2, -0.1), "e": (None, None)}
    card.scores["differences"]["adamw"] = {
        task: {"iqm": 0.0, "low": low, "high": high, "count": 3} for task, (low, high) in intervals.items()
    }
    row = next(line for line in render(card).splitlines() if line.startswith("| adamw |"))
    assert "| 2 / 1 |" in row


def test_nothing_is_written_of_an_entry_that_cannot_be_made(zoo: Path, run: Path, raced: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in ("config.json", "metrics.jsonl"):
        (other / file).write_bytes((run / file).read_bytes())
    bound = _another()
    save_theta(other / THETA_FILE, "small_fc_lopt", bound.learned, {n: 2 * v for n, v in bound.theta.items()})
    into = tmp_path / "zoo"
    for arguments, message in (
        ((run, "Two Words", into, raced), "lower-case letters, digits and underscores, got 'Two Words'"),
        ((raced, "tiny", into, raced), "is no directory of a meta-training run: it holds no config.json"),
        ((run, "tiny", into, run), "is no directory of a race: it holds no race.json"),
        ((other, "tiny", into, raced), "none of the contenders adamw, fresh, mine of that race is the rule of the run"),
        ((run, "tiny", zoo, raced), "is there already"),
    ):
        *first, at = arguments
        with pytest.raises(ValueError, match=message):
            add(*first, race=at, **TOLD)
    with pytest.raises(ValueError, match="limits must not be empty"):
        add(run, "tiny", into, race=raced, **{**TOLD, "limits": ""})
    assert not into.exists() or not list(into.iterdir())


def test_a_race_of_weights_on_another_device_or_in_another_order_is_still_theirs(run: Path) -> None:
    theta = load_theta(run).theta
    assert digest(dict(reversed(theta.items()))) == digest(theta)
    changed = {**theta, "b0": theta["b0"] + 1e-7}
    assert digest(changed) != digest(theta)
    with pytest.raises(ValueError, match="none of the contenders a of that race"):
        scores_of({"contenders": {"a": {**description(load_theta(run)), "theta": digest(changed)}}}, load_theta(run))


# --- used -------------------------------------------------------------------------------------------------------------


def test_an_entry_trains_like_its_run(zoo: Path, run: Path) -> None:
    results = []
    for rule in ("zoo:tiny", str(run)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = metaopt.optimizer(rule, model, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(3, 4)) ** 2).mean().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)
    assert resolve_rule("zoo:tiny", lr=0.25).hp["lr"] == 0.25


def test_an_entry_races_and_is_exported(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Task.from_module(
        lambda: torch.nn.Linear(3, 1), torch.nn.functional.mse_loss,
        {"train": (torch.randn(40, 3), torch.randn(40, 1))}, name="line", horizon=4,
    )  # fmt: skip
    result = race(["zoo:tiny", "sgd"], [task], seeds=2, grid=0, progress=False)
    assert result.contenders["zoo:tiny"]["theta"] == digest(resolve_rule("zoo:tiny").theta)  # type: ignore[attr-defined]
    assert main(["export", "zoo:tiny", "--to", str(tmp_path / "tiny.py")]) == 0
    assert "class Tiny(Optimizer)" in (tmp_path / "tiny.py").read_text()


def test_an_unknown_entry_is_one_sentence(zoo: Path) -> None:
    with pytest.raises(ValueError, match=r"no zoo rule is called 'tyni'; .*tiny"):
        metaopt.optimizer("zoo:tyni", [torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="no zoo rule is called 'os:system'"):
        resolve_rule("zoo:os:system")


# --- verified ---------------------------------------------------------------------------------------------------------


def test_an_entry_verifies(zoo: Path) -> None:
    assert verify(zoo / "tiny") <= 1e-6, "the same machine repeats the losses up to the printing of them"


def test_installed_entries_verify() -> None:
    for spec in registry.Registry.discover().specs("zoo_rule").values():
        assert verify(spec.defaults["directory"]) <= GOLDEN_RTOL


def test_the_bare_name_of_an_entry_is_told_how_to_be_written() -> None:
    with pytest.raises(ValueError, match="'orthogonal_fast' is an entry of a zoo; write 'zoo:orthogonal_fast'"):
        resolve_rule("orthogonal_fast")


def test_an_installed_entry_steps_as_its_exported_file_does(tmp_path: Path) -> None:
    reference = "zoo:orthogonal_fast"
    written = registry.load("exporter", "torch")(resolve_rule(reference), "fast", tmp_path / "fast.py")
    models = [torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    exported = runpy.run_path(str(written))["Fast"](models[1].parameters(), lr=0.01, horizon=20)
    made = metaopt.optimizer(reference, models[0].parameters(), lr=0.01, horizon=20), exported
    inputs = torch.linspace(-1, 1, 32).reshape(8, 4)
    losses = []
    for _ in range(20):
        for model, optimizer in zip(models, made, strict=True):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs[:, :3].sin()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-4)  # single precision, of two executions


def test_tolerance_tells_other_weights_from_rounding(zoo: Path, tmp_path: Path) -> None:
    rule = load_theta(zoo / "tiny")
    nudged = {name: value * (1 + 1e-6) for name, value in rule.theta.items()}  # ten times float32's rounding
    other = {name: value * 1.05 for name, value in rule.theta.items()}
    for theta, passes in ((nudged, True), (other, False)):
        copy = tmp_path / str(passes)
        copy.mkdir()
        path = save_theta(copy / THETA_FILE, "small_fc_lopt", rule.learned, theta)
        made = _changed(zoo, copy, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        (made / THETA_FILE).write_bytes(path.read_bytes())
        (made / "README.md").write_text(render(read_card(made)))
        if passes:
            verify(made)
        else:
            with pytest.raises(ValueError, match="does not train as it did: on digits_mlp its losses are"):
                verify(made)


def test_weights_that_are_not_the_cards_are_refused(zoo: Path, tmp_path: Path) -> None:
    copy = _changed(zoo, tmp_path)
    data = bytearray((copy / THETA_FILE).read_bytes())
    data[-1] ^= 1
    (copy / THETA_FILE).write_bytes(data)
    (plugin,) = entries(tmp_path)
    with pytest.raises(ValueError, match="is not what its card describes: sha256"):
        load(plugin.defaults["directory"])
    (copy / THETA_FILE).unlink()
    with pytest.raises(ValueError, match="sha256 nothing"):
        verify(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limits": None}, "is not a complete card: it lacks limits"),
        ({"limits": ""}, "limits must not be empty"),
        ({"tasks": []}, "tasks must not be empty"),
        ({"seed": "three"}, "seed must be a int, got 'three'"),
        ({"stars": 5}, "stars does not belong there"),
        ({"name": "other"}, "is the card of 'other'"),
        ({"golden": {"task": "digits_mlp"}}, "golden must hold .*; it lacks content, losses, rtol, seed"),
        ({"learned_optimizer": "nothing"}, "belongs to small_fc_lopt"),
        ({"summary": "a tiny two"}, "README.md is not the page of its card"),
    ],
)
def test_a_card_that_is_not_complete_is_refused(
    fields: dict[str, Any], message: str, zoo: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        verify(_changed(zoo, tmp_path, **fields))


def test_a_changed_task_is_told_apart_from_a_changed_rule(zoo: Path, tmp_path: Path) -> None:
    golden = {**read_card(zoo / "tiny").golden, "content": "0" * 12}
    copy = _changed(zoo, tmp_path, golden=golden)
    with pytest.raises(ValueError, match="its data or architecture have changed"):
        verify(copy)


def test_weights_name_no_code_to_run(tmp_path: Path) -> None:
    """The metadata of a file of numbers comes from whoever wrote it."""

    class Named(LearnedRule):
        def __init__(self) -> None: ...
        def declared(self) -> dict[str, Any]:
            return {}

        values = declared
        init_theta = init = update = lambda *arguments: None  # type: ignore[assignment]

    path = save_theta(tmp_path / THETA_FILE, "os:system", Named(), {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="names 'os:system', which is no learned rule"):
        load_theta(path)


def test_weights_of_another_version_are_refused(tmp_path: Path) -> None:
    theta = AdafacMLP().init_theta(torch.Generator())
    for changed, message in (
        ({**theta, "w0": theta["w0"][:30]}, r"w0 is \(30, 4\), expected \(39, 4\)"),
        ({**theta, "zeta": torch.zeros(2)}, r"zeta is \(2,\), expected none"),
        ({name: value for name, value in theta.items() if name != "b1"}, r"b1 is absent, expected \(4,\)"),
    ):
        path = save_theta(tmp_path / "old.safetensors", "small_fc_lopt", AdafacMLP(), changed)
        with pytest.raises(ValueError, match=f"do not fit small_fc_lopt: {message}"):
            load_theta(path)
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_theta(tmp_path / "torn.safetensors")


# --- programs ---------------------------------------------------------------------------------------------------------

MINE = """
from metaopt import registry


def task(device="cpu"):
    return registry.create("task", "wine_mlp", device=device)
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers of a search leave behind, and `simplify`; one of its tasks is in a file of the user's own."""
    directory = tmp_path_factory.mktemp("searched") / "found"
    (directory.parent / "mine.py").write_text(MINE)
    tasks = f"iris_mlp,{directory.parent / 'mine.py'}:task"
    search = [
        "discover", "rule", "--start", "momentum", "--searcher", "constants", "--set", "population=200",
        "--tasks", tasks, "--budget", "200", "--seed", "5",
    ]  # fmt: skip
    for worker in ("0", "1"):
        assert main([*search, "--out", str(directory), "--worker", worker]) == 0
    assert main(["simplify", str(directory), "--tolerance", "0.0"]) == 0
    return directory


@pytest.fixture(scope="module")
def searched_race(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("race")
    contenders = {"found": f"{searched}/champion.py:Champion", "adamw": "adamw", "lion": "lion"}
    save(race(contenders, ["digits_mlp"], seeds=3, steps=5, grid=0, progress=False), directory)
    return directory


@pytest.fixture
def program(searched: Path, searched_race: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The entry ``found`` of a zoo whose plugin is installed."""
    made = add(searched, "found", tmp_path / "zoo", race=searched_race, **TOLD)

    class Plugin:
        @hookimpl
        def metaopt_zoo_rules(self) -> list[Spec]:
            return entries(tmp_path / "zoo")

    found = registry.Registry.discover()
    found.register(Plugin(), "strangers")
    monkeypatch.setattr(registry, "default", lambda: found)
    return made


def test_a_found_program_is_an_entry(program: Path, searched: Path, tmp_path: Path) -> None:
    rule, found = resolve_rule("zoo:found"), resolve_rule(f"{searched}/champion.py:Champion")
    assert isinstance(rule, ElementwiseRule) and isinstance(found, ElementwiseRule)
    assert (rule.program, rule.hp) == (found.program, found.hp)
    assert verify(program) <= 1e-6
    card = read_card(program)
    assert isinstance(card, ProgramCard)
    assert parse_program(card.program).statements == rule.program.statements
    assert card.hyperparameters == found.hp and {"lr", "beta1"} == found.hp.keys()
    assert hashlib.sha256((searched / "champion.py").read_bytes()).hexdigest() == card.sha256
    reports = [json.loads((searched / name).read_text())["counts"] for name in ("report.json", "report-1.json")]
    assert card.cost == {
        "children": 400,
        "trained_candidates": sum(counts["unique"] for counts in reports),
        "inner_steps": sum(counts["updates"] for counts in reports),
        "seconds": round(sum(counts["seconds"] for counts in reports)),
    }
    assert (card.seed, card.device, card.tasks) == (5, "cpu", ["iris_mlp", "mine.py:task"])
    assert "CC BY" in card.data["iris"] and card.data["data of mine.py:task"] == "unknown"
    assert card.scores["label"] == "found" and set(card.scores["entries"]) == {"found", "adamw", "lion"}
    assert {path.name for path in program.iterdir()} - {"__pycache__"} == {
        "rule.py", "card.json", "README.md", "report.json", "report-1.json", "champion.json", "start.txt",
    }  # fmt: skip
    for path in program.iterdir():
        assert path.is_dir() or str(searched.parent) not in path.read_text(), "no path of the machine is published"


def test_the_commands_of_a_card_repeat_the_search(
    program: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(searched.parent / "mine.py", program / "mine.py")
    monkeypatch.chdir(program)
    for line in read_card(program).command.splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert (program / "runs" / "found" / "champion.py").read_bytes() == (program / "rule.py").read_bytes()


def test_a_program_is_shown_listed_and_exported(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["zoo", "show", "found"]) == 0
    page = capsys.readouterr().out
    assert f"```python\n{read_card(program).program}\n```" in page  # type: ignore[attr-defined]
    assert "Searched on iris_mlp" in page and "400 children" in page and "| adamw |" in page
    assert main(["zoo", "list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("found"))
    assert "program" in row and "Apache-2.0" in row
    assert main(["export", "zoo:found", "--to", str(tmp_path / "found.py")]) == 0
    assert "class Found(Optimizer)" in (tmp_path / "found.py").read_text()


def _card_says(entry: Path, **fields: Any) -> None:
    """Change fields of a card, and its page."""
    card = json.loads((entry / CARD_FILE).read_text()) | fields
    (entry / CARD_FILE).write_text(json.dumps({name: value for name, value in card.items() if value is not None}))
    if None not in fields.values():
        (entry / "README.md").write_text(render(read_card(entry)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"program": "def update(param, grad):\n    return param + grad"}, "is not the program on its card"),
        ({"hyperparameters": {"beta7": 0.5}}, "has the hyperparameters .*, not {'beta7': 0.5}"),
        ({"hyperparameters": None}, "is not a complete card: it lacks hyperparameters"),
        ({"meta_parameters": 3}, "meta_parameters does not belong there"),
    ],
)
def test_a_card_of_another_program_is_refused(fields: dict[str, Any], message: str, program: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _card_says(program, **fields)
        verify(program)


def test_only_the_source_that_the_card_describes_is_imported(program: Path, tmp_path: Path) -> None:
    witness = tmp_path / "imported"
    text = f"from pathlib import Path\nPath({str(witness)!r}).touch()\nChampion = print\n"
    (program / "rule.py").write_text(text)
    with pytest.raises(ValueError, match="is not what its card describes: sha256"):
        metaopt.optimizer("zoo:found", [torch.nn.Parameter(torch.ones(2))])
    assert not witness.exists()
    _card_says(program, sha256=hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(ValueError, match=r"Champion of .*rule.py is no ElementwiseRule"):
        load(program)


def test_a_champion_that_the_search_did_not_find_is_no_entry(
    searched: Path, searched_race: Path, tmp_path: Path
) -> None:
    def refused(message: str, run: Path, at: Path = searched_race) -> None:
        with pytest.raises(ValueError, match=message):
            add(run, "found", tmp_path / "zoo", race=at, **TOLD)

    copy = tmp_path / "found"
    shutil.copytree(searched, copy)
    for path in copy.glob("report*.json"):
        report = json.loads(path.read_text())
        report["champion"]["text"] += "better"
        path.write_text(json.dumps(report))
    refused("is not of the best candidate in the search's report or funnel; simplify", copy)
    with (copy / "champion.py").open("a") as file:
        file.write("# by hand\n")
    refused("is not what metaopt simplify wrote; simplify", copy)
    other = json.loads((searched_race / "race.json").read_text())
    other["contenders"]["found"]["program"] = other["contenders"]["adamw"]["program"]
    (tmp_path / "race.json").write_text(json.dumps(other))
    refused("none of the contenders adamw, found, lion of that race is the rule of the run", searched, tmp_path)
    assert not list(tmp_path.glob("zoo/*"))


def test_a_suite_of_searches_names_its_data() -> None:
    """Its tasks are registered ones with options, under names of its own."""
    chosen = task_choices("search")
    assert {"name": "digits_mlp", "options": {"hidden": (16,), "activation": "tanh", "batch_size": 32}} in chosen
    for choice, task in zip(chosen, tasks_of("search").values(), strict=True):
        assert content_hash(
            registry.create("task", choice["name"], **choice["options"], name=task.name)
        ) == content_hash(task)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_lists_shows_and_verifies(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny"))
    assert "a tiny one" in row and "small_fc_lopt" in row and "Apache-2.0" in row and "strangers" in row
    assert main(["zoo", "show", "tiny"]) == 0
    assert capsys.readouterr().out == (zoo / "tiny" / "README.md").read_text()
    assert main(["zoo", "show", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"] == TOLD["limits"]
    assert main(["zoo", "verify"]) == 0
    assert "tiny: good; recorded losses repeat to" in capsys.readouterr().out


def test_command_adds(run: Path, raced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [part for name, value in TOLD.items() for part in (f"--{name}", value)]
    given = ["zoo", "add", str(run), "mine", "--race", str(raced), "--to", str(tmp_path), "--task", "digits_mlp", *told]
    assert main(given) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "no temporary directory is left"
    assert main(given) == 2
    assert "is there already; what is published does not change" in capsys.readouterr().err


def test_a_broken_entry_hides_no_other(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _changed(zoo, tmp_path, limits=None)
    (tmp_path / "sound").mkdir()
    for file in (zoo / "tiny").iterdir():
        text = file.read_bytes()
        (tmp_path / "sound" / file.name).write_bytes(
            text.replace(b'"name": "tiny"', b'"name": "sound"') if file.name == CARD_FILE else text
        )
    (tmp_path / "sound" / "README.md").write_text(render(read_card(tmp_path / "sound")))

    class Plugin:
        @hookimpl
        def metaopt_zoo_rules(self) -> list[Spec]:
            return entries(tmp_path)

    found = registry.Registry.discover()
    found.register(Plugin(), "mixed")
    monkeypatch.setattr(registry, "default", lambda: found)
    assert main(["zoo", "list"]) == 0
    out = capsys.readouterr().out
    assert "unusable" in out and "it lacks limits" in out and "sound" in out
    assert main(["zoo", "verify"]) == 2
    told = capsys.readouterr()
    assert "sound: good" in told.out and "tiny: " in told.out
    assert f"1 of {len(found.specs('zoo_rule'))} entries failed: tiny" in told.err


def test_listing_imports_no_torch(zoo: Path) -> None:
    code = (
        "import sys\n"
        "from metaopt.zoo import entries\n"
        f"assert [spec.name for spec in entries({str(zoo)!r})] == ['tiny']\n"
        "from metaopt.cli import main\n"
        "assert main(['zoo', 'list']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
