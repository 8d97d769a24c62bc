"""Rules that proposers write: how they are read and judged, what authors are told, what survives a kill, what users get."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Step, proposes, serving

from metaopt.cli import main
from metaopt.program import evaluate
from metaopt.program.parse import parse_program
from metaopt.search import Archive
from metaopt_symbolic import cascade
from metaopt_symbolic.cascade import Cascade, Stage
from metaopt_symbolic.champion import write_champion
from metaopt_symbolic.funnel import distinct, tuned
from metaopt_symbolic.genome import SEEDS, Genome, parse
from metaopt_symbolic.proposals.candidate import Candidate
from metaopt_symbolic.proposals.loop import Loop, LoopConfig
from metaopt_symbolic.proposals.proposers import proposing
from metaopt_symbolic.rules.candidate import RuleValidator, read
from metaopt_symbolic.rules.judge import RATES, Judge, Score
from metaopt_symbolic.rules.mutator import RuleMutator
from metaopt_symbolic.rules.report import response
from metaopt_symbolic.suites import search_tasks

TASKS = search_tasks("iris_mlp")
TINY = (Stage(("iris_mlp",), (2, 3, 4)), Stage(("iris_mlp",), (4, 6, 8), seeds=(0, 1)))

ADAM = """
def rule(param, grad, m, v, *, lr, t):
    m = 0.9 * m + 0.1 * grad
    v = 0.99 * v + 0.01 * grad * grad
    return param - lr * (m / (1 - 0.9 ** t)) / (torch.sqrt(v / (1 - 0.99 ** t)) + 1e-8), m, v
"""
ADAMW = """
def rule(param, grad, v, m, *, lr, t):
    m = 0.9 * m + 0.1 * grad
    v = 0.99 * v + 0.01 * torch.square(grad)
    step = (m / (1 - 0.9 ** t)) / (torch.sqrt(v / (1 - 0.99 ** t)) + 1e-8)
    return param - lr * 0.3 * param - lr * step, v, m
"""
NESTEROV = """
def rule(param, grad, g, *, lr):
    g = 0.9 * g + grad
    return param - lr * (grad + 0.9 * g), g
"""
PLAIN = "def rule(param, grad, *, lr):\n    return param * 1.0 - lr * grad"
EXPLODES = "def rule(param, grad, m, *, lr):\n    m = 1e40 * m + grad\n    return param - m, m"


def trained(program: Any, grads: Sequence[torch.Tensor], lr: float) -> torch.Tensor:
    """A parameter of ones after these gradients."""
    slots = {name: torch.zeros_like(grads[0]) for name in program.tensors[2:]}
    param = torch.ones_like(grads[0])
    for t, grad in enumerate(grads, 1):
        param, *new = evaluate(program, {"param": param, "grad": grad, **slots}, {"lr": lr, "t": float(t)})
        slots = dict(zip(slots, new, strict=True))
    return param


# -- candidates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "made"),
    [
        (ADAM, lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.9, 0.99))),
        (ADAMW, lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.9, 0.99), weight_decay=0.3)),
        (NESTEROV, lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True)),
        (PLAIN, lambda p: torch.optim.SGD(p, lr=0.03)),
    ],
)
def test_what_a_model_writes_is_the_optimizer_of_torch(text: str, made: Any) -> None:
    grads = [*torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    wanted = torch.ones(7, dtype=torch.float64, requires_grad=True)
    optimizer = made([wanted])
    for grad in grads:
        wanted.grad = grad
        optimizer.step()
    genome = read(text)
    for program in (genome.program(), read(RuleValidator().python(genome)).program()):
        torch.testing.assert_close(trained(program, grads, 0.03), wanted.detach(), rtol=1e-12, atol=1e-12)


def test_the_update_is_what_the_learning_rate_multiplies() -> None:
    """The funnel and the file of a champion look for that."""
    assert read(NESTEROV).body[-2] == ("update", "mul", ("lr", "v3"))
    assert read(ADAMW).body[-3].target == "update" and read(ADAMW).body[-3].function == "add"


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_printed_rules_are_read_as_the_same(name: str) -> None:
    validate = RuleValidator()
    genome = read(SEEDS[name])
    printed = validate.python(genome)
    assert validate.behaviour(read(printed)) == validate.behaviour(genome)
    validate.remember(genome, name)
    assert f"the same as {name};" in str(validate(printed))
    faster = re.sub(r"lr \* ([\d.]+)", r"lr * \g<1>3", printed)
    assert faster != printed and f"the same as {name};" in str(validate(faster)), "learning rates are tuned"


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("def rule(param, grad, *, lr, beta):\n    return param - lr * beta * grad", "lr and t, got 'beta'"),
        ("def rule(param, grad, *, lr):\n    return param", "does not depend on the gradient"),
        ("def rule(param, grad, *, lr):\n    return param - lr * torch.sqrt(grad)", "no finite number"),
        ("def rule(param, grad, m, *, lr):\n    return param - lr * grad", "2 new values"),
        ("def rule(param, grad, *, lr):\n    return param - lr * open('x')", "open"),
        ("def rule(param, grad, *, lr):\n    for k in grad: pass\n    return param", "no assignment"),
        ("def rule(param, grad, m, *, lr):\n    return param - m * grad, lr", "no value for each element"),
        ("def loss(rho):\n    loss = square(rho)\n    return loss", "parameter, gradient and state"),
        ("def rule(param, grad, *, lr):\n" + "".join(f"    x{k} = {'grad' if not k else f'x{k - 1}'} * {k + 2}\n"
         for k in range(70)) + "    return param - lr * x69", "may have 64 values"),
        ("import os", "must be one function"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_rule_is_said_in_words(source: str, wrong: str) -> None:
    assert wrong in (RuleValidator()(source) or "")


def test_the_prompt_promises_what_is_read() -> None:
    text = resources.files("metaopt_llm").joinpath("templates/rule.txt").read_text()
    validate = RuleValidator()
    example = text[text.index("def rule") : text.index("\n\nparam is")]
    assert validate(example) is None
    listed = text[text.index("and torch's\n") + len("and torch's\n") : text.index("; x.norm()")]
    names = re.findall(r"\w+", listed.replace(" and ", ", "))
    assert len(names) == 20
    for name in names:
        args = {"clamp": "grad, min=-1.0, max=1.0", "maximum": "grad, param", "minimum": "grad, param"}.get(
            name, "grad"
        )
        args = args.replace("grad", "grad * grad + 1") if name in ("log", "log1p", "rsqrt", "sqrt") else args
        source = f"def rule(param, grad, *, lr):\n    return param - lr * torch.{name}({args}) - lr * grad.norm() * grad.mean()"
        assert parse_program(source)
        assert validate(source) is None, name


def test_what_the_grammar_lets_a_small_model_write_is_valid() -> None:
    text = resources.files("metaopt_llm").joinpath("templates/rule.gbnf").read_text()
    rules = dict(line.split(" ::= ", 1) for line in text.splitlines() if not line.startswith("#"))
    rng = np.random.default_rng(0)

    def derived(name: str) -> str:
        parts = re.findall(r'"[^"]*"|\[.-.\]|[a-z-]+', str(rng.choice(rules[name].split(" | "))))
        return "".join(map(written, parts))

    def written(part: str) -> str:
        if part.startswith("["):
            return str(rng.integers(int(part[1]), int(part[3]) + 1))
        return part[1:-1].replace(r"\n", "\n") if part.startswith('"') else derived(part)

    found = {derived("root") for _ in range(200)}
    assert len(found) > 150
    errors = {source: RuleValidator()(source) for source in sorted(found)}
    assert not {source: error for source, error in errors.items() if error}


# -- judging -------------------------------------------------------------------------------------------------------------


def test_a_rule_has_the_loss_of_its_best_learning_rate() -> None:
    stage = dataclasses.replace(TINY[1], multipliers=(1.0,))
    genome = read("def rule(param, grad, *, lr):\n    return param - lr * torch.sign(grad)")
    (score,) = Judge(TASKS, [stage]).scores([genome])
    by_rate = {rate: -Cascade(TASKS, [stage]).scores([genome.scaled(rate).program()])[0].fitness for rate in RATES}
    assert score.loss == pytest.approx(min(by_rate.values()), rel=1e-5)
    assert by_rate[score.multiplier] == pytest.approx(score.loss, rel=1e-5)
    assert by_rate[1.0] > 1.2 * score.loss, "a step of 1 is too long"
    assert score.fault == "" and score.diverged == 0
    (exploded,) = Judge(TASKS, [stage]).scores([read(EXPLODES)])
    assert exploded.diverged == 1
    assert "diverged in 100 % of its runs" in exploded.fault


def test_a_response_is_the_update_of_each_step() -> None:
    # velocities 1, 1.9, 0.71
    wanted = torch.tensor([1 + 0.9, 1 + 0.9 * 1.9, -1 + 0.9 * 0.71], dtype=torch.float64)
    torch.testing.assert_close(response(read(NESTEROV), (1.0, 1.0, -1.0)), wanted)


# -- searching -------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """In place of a signal."""


class DyingJudge(Judge):
    """Dies when it is asked for the fourth time: the start, nobody while the first round is asked for, one round, and then."""

    asked = 0

    def scores(self, candidates: Sequence[Genome]) -> list[Score]:
        self.asked += 1
        if self.asked == 4:
            raise Killed
        return super().scores(candidates)


@contextmanager
def loop_in(
    directory: Path, judge: Judge, names: Sequence[str] = ("mutator",), **options: Any
) -> Iterator[Loop[Score]]:
    validator = RuleValidator()
    with proposing(names, validator, directory, options=options) as (proposer, _):
        config = LoopConfig(
            "Train.", tuple(names), "", {"start": SEEDS["momentum"]}, batch=4, ahead=True, islands={"count": 2}
        )
        yield Loop(config, judge, proposer, validator, directory)


def shown(candidates: Sequence[Candidate[Score]]) -> list[tuple[Any, ...]]:
    return [(c.name, c.source, c.genome, c.parents, c.proposal, c.score) for c in candidates]


def test_a_killed_search_for_rules_goes_on_to_the_same_champion(tmp_path: Path) -> None:
    with loop_in(tmp_path / "whole", Judge(TASKS, TINY)) as whole:
        whole.run(evaluations=12)
    with loop_in(tmp_path / "killed", DyingJudge(TASKS, TINY)) as dying, pytest.raises(Killed):
        dying.run(evaluations=12)
    with loop_in(tmp_path / "killed", Judge(TASKS, TINY)) as again:
        assert 0 < again.counts.evaluated < 12
        again.run(evaluations=12)
    assert shown(again.candidates) == shown(whole.candidates)
    assert shown(RuleValidator().load(tmp_path / "killed")) == shown(again.candidates)
    assert len({c.source for c in whole.candidates}) == 13
    assert all(parse_program(c.source) for c in whole.candidates), "mutants are shown as language models write"


def signs(k: int) -> str:
    return (
        f"def rule(param, grad, m, *, lr, t):\n    m = 0.9 * m + grad\n    return param - lr * torch.tanh({k}.5 * m), m"
    )


def asking(url: str) -> dict[str, Any]:
    return {"model": "tiny", "base_url": url, "key_env": "", "dialect": "other"}


def test_a_killed_search_for_rules_pays_for_no_answer_twice(tmp_path: Path) -> None:
    with serving(proposes(signs(k), f"tanh_{k}", "bounded") for k in itertools.count(2)) as running:
        options = asking(running.url)
        with loop_in(tmp_path, DyingJudge(TASKS, TINY), ("openai",), **options) as dying, pytest.raises(Killed):
            dying.run(evaluations=8)
        paid = len(running.seen)
        with loop_in(tmp_path, Judge(TASKS, TINY), ("openai",), **options) as again:
            again.run(evaluations=8)
    assert len(running.seen) == paid == 8
    assert (again.counts.evaluated, again.counts.tokens) == (8, 8 * 120)
    archived = {e.facts["name"]: e for e in Archive(tmp_path, RuleValidator.study, None).elites()}
    assert archived.keys() == {"start", *(f"tanh_{k}" for k in range(2, 10))}
    assert archived["tanh_3"].text == signs(3) and archived["tanh_3"].facts["thought"] == "bounded"
    found = {genome.text() for genome in distinct([*archived.values()], 20)}
    assert len(found) == 2, "all of these differ in numbers alone"


def test_models_see_scores_errors_and_what_diverged(tmp_path: Path) -> None:
    def script() -> Iterator[Step]:
        yield proposes(EXPLODES, "exploding")
        yield proposes("def rule(param, grad, *, lr, beta):\n    return param - beta * grad", "number")
        yield proposes(PLAIN, "mended")
        yield proposes(signs(2), "tanh_2")

    with serving(script()) as running, loop_in(
        tmp_path, Judge(TASKS, TINY), ("openai",), **asking(running.url)
    ) as loop:  # fmt: skip
        for _ in range(3):
            loop._round(1)
            loop._keep(loop._scores())
    repaired, last = (running.seen[k].body["messages"] for k in (2, 3))
    assert "a rule's numbers are lr and t, got 'beta'" in repaired[-1]["content"]
    told = last[-1]["content"]
    assert "> exploding: training diverged in 100 % of its runs" in told
    best = {c.name: f"{c.name}: score {c.score.loss:.4g} (iris_mlp " for c in loop.candidates[:3]}
    assert best.keys() == {"start", "exploding", "mended"} and all(title in told for title in best.values())
    assert "return param - lr * new_m" in told or "return param - update" in told, "the start as Python"
    (exploded,) = (e for e in loop.archive.elites() if e.facts["name"] == "exploding")
    assert exploded.facts["diverged"] == 1 and exploded.score == loop.candidates[1].score.loss
    assert loop.best.name != "exploding"


def test_mutants_of_rules_are_valid_and_the_same_for_the_same_request(tmp_path: Path) -> None:
    validate = RuleValidator()
    with loop_in(tmp_path, Judge(TASKS, TINY)) as loop:
        requests = [loop._request(k) for k in range(6)]
    found = [RuleMutator(validate, seed=1).propose(request) for request in requests]
    assert [validate(p.source) for p in found] == [None] * 6
    assert len({p.source for p in found}) > 3
    assert found == [RuleMutator(validate, seed=1).propose(request) for request in requests]


# -- commands ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cascade.JUDGES, "usual", lambda tasks: TINY)


COMMAND = ["discover", "rule", "--start", "momentum", "--tasks", "iris_mlp", "--batch", "3", "--seed", "2"]


@pytest.mark.usefixtures("quick")
def test_the_same_command_finds_the_same_rule_which_goes_on_as_those_of_searchers_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    given = [*COMMAND, "--proposer", "mutator"]
    assert main([*given, "--budget", "9", "--out", one]) == 0
    told = capsys.readouterr().err
    assert "of tuned adamw" in told and "def rule(param, grad" in told
    for budget in ("3", "9"):
        assert main([*given, "--budget", budget, "--out", two]) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["history"] == reports[1]["history"] and reports[0]["counts"]["evaluated"] == 9
    assert reports[0]["champion"] == reports[1]["champion"]
    text = (tmp_path / "one" / "champion.txt").read_text()
    best = Archive(tmp_path / "one", RuleValidator.study, None).elites()[0]
    assert text == reports[0]["champion"]["text"] == tuned(best).text()
    assert parse(text).tensors[:2] == ("w", "g")
    _, path = write_champion(tmp_path / "one", tolerance=0.0, evolution=0)
    assert json.loads(path.with_suffix(".json").read_text())["simplified"] == text
    race = ["race", f"{path}:Champion", "adamw", "--tasks", "iris_mlp", "--steps", "3", "--seeds", "2", "--grid", "0"]
    assert main([*race, "--out", str(tmp_path / "race")]) == 0
    zoo = ["zoo", "add", one, "found", "--race", str(tmp_path / "race"), "--to", str(tmp_path / "zoo")]
    assert main([*zoo, "--license", "MIT", "--summary", "A rule.", "--limits", "Tried on nothing."]) == 0
    card = json.loads((tmp_path / "zoo" / "found" / "card.json").read_text())
    assert "--proposer mutator --batch 3 --seed 2 --budget 9" in card["command"]
    assert card["cost"].keys() == {"proposals", "trained_candidates", "seconds"}
    capsys.readouterr()
    name = reports[0]["champion"]["name"]
    assert main(["show", name, "--from", one]) == 0
    told = capsys.readouterr().out
    assert "def rule(param, grad" in told and "validation loss" in told and "by start" in told
    assert (tmp_path / "one" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick")
def test_a_mixture_with_a_language_model_keeps_to_its_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(proposes(signs(k), f"tanh_{k}") for k in itertools.count(2)) as running:
        options = [part for key, value in asking(running.url).items() for part in ("--set", f"{key}={value}")]
        given = [*COMMAND, "--proposer", "openai,mutator", "--calls", "2", "--out", str(tmp_path), *options]
        assert main([*given, "--budget", "9"]) == 0
        assert len(running.seen) == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"]["evaluated"] == 9 and report["calls"]["calls"] == 2
    by = [c.proposal.proposer for c in RuleValidator().load(tmp_path) if c.proposal]
    assert by.count("openai") == 2 and by.count("mutator") == 7
    recorded = [*COMMAND, "--proposer", "recorded", "--budget", "1", "--out", str(tmp_path / "again")]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "ledger-0.jsonl").write_bytes((tmp_path / "ledger-0.jsonl").read_bytes())
    assert main(recorded) == 0, capsys.readouterr().err
    names = [c.name for c in RuleValidator().load(tmp_path / "again")]
    assert names == ["start", "tanh_2"]


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (["--proposer", "evolution"], "evolution writes no texts of candidates; choose from"),
        (["--proposer", "mutator", "--searcher", "random"], "got random and mutator; leave one out"),
        (["--calls", "3"], "are of proposers; give --proposer"),
        (["--proposer", "mutator", "--money", "1"], "are of language models"),
        (["--proposer", "mutator", "--budget", "soon"], "a budget is a time above 0"),
        (["--proposer", "openai"], "model"),
    ],
)
def test_what_no_proposer_can_search_is_refused_at_once(
    given: list[str], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["discover", "rule", *given, "--out", str(tmp_path / "x")]) != 0
    assert wrong in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x" / "tuned.json").exists()
