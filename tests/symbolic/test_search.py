"""The search goes on where it was, counts what it does, shares its archive, and finds what is planted."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from metaopt import registry, suite
from metaopt.cli import main
from metaopt.rule import ElementwiseRule
from metaopt.search import Archive, Elite
from metaopt_symbolic import baselines, report
from metaopt_symbolic.baselines import tuned_start
from metaopt_symbolic.cascade import Cascade, usual_stages
from metaopt_symbolic.genome import SEEDS, parse
from metaopt_symbolic.planted import Planted
from metaopt_symbolic.population import Genomes
from metaopt_symbolic.search import Budget, Search, SearchConfig
from metaopt_symbolic.searchers import MAX_LENGTH
from metaopt_symbolic.suites import SUITES, search_tasks, task_choices, tasks_of

MOMENTUM = parse(SEEDS["momentum"])


def planted_search(directory: Path, worker: int = 0, **changes: Any) -> Search:
    config: dict[str, Any] = {"options": {"population": 200}, "batch": 50, "migrate_every": 4, **changes}
    return Search(SearchConfig(SEEDS["adamw"], **config), Planted(MOMENTUM), directory, worker=worker)


def facts(search: Search) -> list[Any]:
    counts = {k: v for k, v in vars(search.counts).items() if k != "seconds"}
    return [counts, [(c.genome, c.score, c.parent, c.generation) for c in search.best]]


@pytest.mark.parametrize(
    ("searcher", "options"),
    [
        ("evolution", {"population": 200, "patience": 400}),
        ("islands", {"islands": 2, "population": 100, "migrate_every": 3}),
        ("policy", {"population": 200}),
        ("random", {}),
        ("trees", {"population": 200}),
    ],
)
def test_a_search_in_three_parts_is_the_unbroken_search(searcher: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole = planted_search(tmp_path / "whole", searcher=searcher, options=options)
    whole.run(Budget(children=1500))
    for children in (350, 900, 1500):
        part = planted_search(tmp_path / "parts", searcher=searcher, options=options)
        part.run(Budget(children=children))
    assert facts(part) == facts(whole)
    assert part.archive.elites() == whole.archive.elites()


def test_every_child_is_counted_once(tmp_path: Path) -> None:
    search = planted_search(tmp_path)
    search.run(Budget(children=2000))
    c = search.counts
    assert c.children == 2000 == c.by_hash + c.by_behaviour + c.not_finite + c.inert + c.unique
    assert c.by_hash and c.by_behaviour and c.inert and c.unique
    assert [row["counts"]["children"] for row in search.history] == [1000, 2000]


def test_interrupted_it_saves_and_goes_on(tmp_path: Path) -> None:
    def interrupt(search: Search) -> None:
        if search.counts.generations == 3:
            os.kill(os.getpid(), signal.SIGINT)

    broken = planted_search(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        broken.run(Budget(children=1000), on_generation=interrupt)
    again = planted_search(tmp_path / "broken")
    assert again.counts.generations == 3
    again.run(Budget(children=1000))
    whole = planted_search(tmp_path / "whole")
    whole.run(Budget(children=1000))
    assert facts(again) == facts(whole)


def test_another_search_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    search = planted_search(tmp_path)
    search.run(Budget(children=100))
    with pytest.raises(ValueError, match="holds a search with seed=0, not 1; give the same"):
        planted_search(tmp_path, seed=1)
    with pytest.raises(ValueError, match="holds a search with another start; give the same"):
        Search(dataclasses.replace(search.config, start=SEEDS["lion"]), Planted(MOMENTUM), tmp_path)


def test_workers_take_in_each_others_best(tmp_path: Path) -> None:
    eager: dict[str, Any] = {"options": {"population": 200, "tournament": 20}}  # a guest has children at once
    first = planted_search(tmp_path, **eager)
    first.run(Budget(children=3000))
    second = planted_search(tmp_path, worker=1, **eager)
    second.run(Budget(children=200))
    assert second._welcomed == {first.champion.genome.digest}
    assert second.champion.score.fitness < first.champion.score.fitness
    second.run(Budget(children=600))
    # most children of a guest do what it does, and their fitness is its own
    assert second.champion.score.fitness >= first.champion.score.fitness
    assert {elite.worker for elite in Archive(tmp_path, "discover-rule", vars(second.config)).elites()} == {0, 1}


def test_the_regime_of_the_paper(tmp_path: Path) -> None:
    """After 8,000 children from AdamW, most are known and most statements are redundant; the paper has 89 % and 70 %."""
    tasks = tasks_of("search")
    stages = usual_stages(list(tasks))[:1]  # the others would take most of the time
    config = SearchConfig(tuned_start(SEEDS["adamw"], tasks, stages), options={"population": 100}, batch=50)
    search = Search(config, Cascade(tasks, stages), tmp_path)
    search.run(Budget(children=8000))
    assert search.counts.hits >= 0.7
    assert search.counts.redundancy >= 0.5
    assert search.champion.score.fitness > search.start_fitness


def test_constants_alone_leave_the_program_as_it_is(tmp_path: Path) -> None:
    search = planted_search(tmp_path, searcher="constants")
    search.run(Budget(children=500))
    shape = [(a.target, a.function) for a in parse(SEEDS["adamw"]).body]
    assert all([(a.target, a.function) for a in c.genome.body] == shape for c in search.best)
    assert search.champion.score.fitness > search.start_fitness


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, "population must be at least 2"),
        ({"parsimony": -1e-3}, "parsimony at least 0, got 1000, 2, 0 and -0.001"),
        ({"functions": "some"}, "functions must be one of paper, .*, got 'some'"),
        ({"mutation": {"splcie": 0.5}}, "mutation has the settings complement, constant, .*; got splcie"),
        ({"mutation": {"splice": 2}}, r"splice is a probability in \[0, 1\], got 2"),
    ],
)
def test_options_of_evolution_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.create("proposer", "evolution", **options)


@pytest.mark.parametrize(("price", "length"), [(0.004, 9), (0.006, 8)])
def test_a_statement_that_gains_less_than_its_price_loses_the_tournament(price: float, length: int) -> None:
    whole = parse(SEEDS["adamw"])
    shorter = dataclasses.replace(whole, body=whole.body[:-1])
    searcher = registry.create("proposer", "evolution", population=200, tournament=40, parsimony=price)
    searcher.begin(whole, -1.0)
    searcher.tell(Genomes.of([whole, shorter] * 100, MAX_LENGTH), np.tile([-0.100, -0.105], 100))
    _, parents = searcher.ask(100, np.random.default_rng(0))
    assert len(whole.body) == 9
    assert set(parents.lengths.tolist()) == {length}


# -- archive and budget ------------------------------------------------------------------------------------------------


def elite(**changes: Any) -> Elite:
    return Elite(
        **{"digest": "a", "text": "...", "score": 1.0, "scores": {"x": 1.0}, "worker": 0, "generation": 3, **changes}
    )


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/study.db"])
def test_an_archive_keeps_elites_in_order_and_each_once(storage: str | None, tmp_path: Path) -> None:
    url = storage and storage.format(tmp_path)
    archive = Archive(tmp_path, "s", {"seed": 0}, url)
    kept = [
        elite(score=2.0),
        elite(digest="b", score=1.0, parents=("a",), facts={"stage": 2}),
        elite(digest="c", worker=1),
    ]
    for one in (*kept, kept[0]):
        archive.add(one)
    assert Archive(tmp_path, "s", {"seed": 0}, url).elites() == [kept[1], kept[2], kept[0]]
    with pytest.raises(ValueError, match="must be finite, got nan"):
        archive.add(elite(score=float("nan")))


@pytest.mark.parametrize(
    ("text", "budget"),
    [("90s", Budget(seconds=90)), ("1.5h", Budget(seconds=5400)), ("20m", Budget(seconds=1200)), ("500", Budget(children=500))],
)  # fmt: skip
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.of(text) == budget


@pytest.mark.parametrize("text", ["", "m", "-5m", "0", "2d", "infs", "nanh", "1e3"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a budget is a time above 0"):
        Budget.of(text)


def test_suites_and_tasks_may_be_mixed() -> None:
    mixed = "sign, digits_mlp,suite:fast"
    names = [*SUITES["sign"], *dict.fromkeys(["digits_mlp", *suite.members("fast")])]
    made = search_tasks(mixed)
    assert list(made) == names
    chosen = task_choices(mixed)
    assert [c["name"] for c in chosen[:4]] == [declared["task"] for declared in SUITES["sign"].values()]
    assert {c["name"] for c in chosen[4:]} == {*names[4:]}
    assert not {name for own in SUITES.values() for name in own} & {*registry.specs("task")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("serch", "no suite of a search and no task is called 'serch'; did you mean 'search'?"),
        ("search,digits_mpl", "no task is called 'digits_mpl'; did you mean 'digits_mlp'"),
        ("", "needs at least one task"),
    ],
)
def test_what_is_no_task_is_refused(text: str, message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)) as refused:
        search_tasks(text)
    assert isinstance(refused.value, (ValueError, registry.RegistryError))


def test_tasks_are_made_on_the_device_which_is_part_of_the_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create, asked = registry.create, []

    def recorded(kind: str, name: str, /, **options: Any) -> Any:
        if kind == "task":
            asked.append(options.pop("device"))
        return create(kind, name, **options)

    monkeypatch.setattr(registry, "create", recorded)
    made = search_tasks("sign,digits_mlp", "cuda:1")
    assert asked == ["cuda:1"] * 5
    assert json.loads(report.describe("sign", "usual", made, ()))["device"] == "cpu"  # where they are
    assert main(["discover", "rule", "--device", "nowhere"]) == 2
    assert "device 'nowhere' is not to be had here" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "found")
    run = [
        "discover",
        "rule",
        "--budget",
        "300",
        "--out",
        out,
        "--set",
        "population=200",
        "--tasks",
        "mixtures_mlp",
        "--start",
    ]
    assert main([*run, "lion"]) == 0
    printed = capsys.readouterr().err
    assert "known by structure" in printed
    assert "def train(w, g, m, lr):" in printed
    names = {path.name for path in Path(out).iterdir()}
    assert names == {"champion.txt", "report.json", "search.png", "study.log", "tuned.json", "worker-0.npz"}
    assert main([*run, "adamw"]) == 2
    assert "holds a search with another start; give that one to go on" in capsys.readouterr().err
    assert main([*run, "lion", "--tasks", "digits_mlp"]) == 2
    assert "holds a search on the tasks 'mixtures_mlp' on cpu, as they were then" in capsys.readouterr().err
    assert main([*run, "adafactor"]) == 2
    assert "adafactor is no program" in capsys.readouterr().err


def test_from_a_search_to_an_exported_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "found")
    run = ["discover", "rule", "--budget", "200", "--out", out, "--set", "population=200", "--start", "momentum"]
    run += ["--tasks", "mixtures_mlp"]
    assert main(run) == 0
    champion = (tmp_path / "found" / "champion.txt").read_text()
    monkeypatch.setattr(baselines, "tuned", None)  # what was tuned is not tuned again
    assert main(run) == 0
    assert "the budget of 200 is used up" in capsys.readouterr().err
    assert (tmp_path / "found" / "champion.txt").read_text() == champion
    assert main(["simplify", out, "--tolerance", "0.01"]) == 0
    rule = registry.create("optimizer", f"{out}/champion.py:Champion")
    assert isinstance(rule, ElementwiseRule)
    assert main(["export", f"{out}/champion.py:Champion", "--to", f"{out}/mine.py", "--class", "Mine"]) == 0
    assert main(["simplify", str(tmp_path)]) == 2
    assert "holds no search; make one with metaopt discover rule" in capsys.readouterr().err


_WORKER = """
import sys
from pathlib import Path
from metaopt_symbolic.genome import SEEDS, parse
from metaopt_symbolic.planted import Planted
from metaopt_symbolic.search import Budget, Search, SearchConfig
directory, worker = Path(sys.argv[1]), int(sys.argv[2])
config = SearchConfig(SEEDS["adamw"], options={"population": 200}, batch=50, migrate_every=2)
Search(config, Planted(parse(SEEDS["momentum"])), directory, worker=worker).run(Budget(children=2000))
"""


def test_processes_at_work_at_once_lose_nothing(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", _WORKER, str(tmp_path), str(worker)] for worker in range(3)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    elites = Archive(tmp_path, "discover-rule", None).elites()
    for worker in range(3):
        own = [elite for elite in elites if elite.worker == worker]
        with np.load(tmp_path / f"worker-{worker}.npz") as state:
            best = json.loads(state["facts"].tobytes())["best"]
        assert {parse(one["text"]).digest for one in best} <= {elite.digest for elite in own}
    assert len({(e.worker, e.generation, e.digest) for e in elites}) == len(elites)


def test_a_search_that_does_not_get_on_shows_in_files_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a server thinks: nohup's file would say nothing before the round has ended."""
    monkeypatch.setattr(report, "QUIET", 0.05)
    file, end = io.StringIO(), time.monotonic() + 60
    with report.watched(Console(file=file), Table, lambda: "3 trained"):
        while "3 trained; at work on the next for " not in file.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    told = file.getvalue()
    assert told.startswith("3 trained; at work on the next for 0 s\n")
    time.sleep(0.2)
    assert file.getvalue() == told, "not after its end"
