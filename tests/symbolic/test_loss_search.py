"""The search for losses: how they are judged, who proposes them, what survives a kill, and what users see."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import proposes, serving

from metaopt import registry
from metaopt.cli import main
from metaopt.objective import Objective
from metaopt.program import evaluate
from metaopt.random import hash64, sample_indices
from metaopt.search import Archive, ProposerError, Request
from metaopt_symbolic.genome import LOSS_SEEDS, Genome, parse
from metaopt_symbolic.language import FUNCTIONS as LANGUAGE
from metaopt_symbolic.losses import judge as judge_module
from metaopt_symbolic.losses.candidate import FUNCTIONS, LossValidator, objective, python, read
from metaopt_symbolic.losses.judge import (
    Judge,
    Regime,
    Score,
    Stage,
    margin_of,
    measured,
    report_stage,
    search_stages,
    train,
)
from metaopt_symbolic.losses.mutator import LossMutator, joined
from metaopt_symbolic.losses.selection import select
from metaopt_symbolic.proposals.candidate import Candidate
from metaopt_symbolic.proposals.islands import Islands, Member
from metaopt_symbolic.proposals.loop import Loop, LoopConfig
from metaopt_symbolic.proposals.proposers import proposing
from metaopt_tasks.preference import preference

TINY = (
    Stage((Regime("noisy", {"data": "preferences_noisy"}),), 2, (0,)),
    Stage((Regime("clean", {"data": "preferences_clean"}),), 3, (0, 1)),
)
RHO = torch.linspace(-20, 20, 41, dtype=torch.float64)


def value(genome: Genome) -> torch.Tensor:
    return evaluate(genome.program(), {"rho": RHO}, {})[0]


def dpo(beta: float) -> Objective:
    made = registry.create("objective", "dpo", beta=beta)
    assert isinstance(made, Objective)
    return made


# -- judging -------------------------------------------------------------------------------------------------------------


def test_a_judged_run_is_adam_on_the_task_and_its_score_the_validation_loss() -> None:
    task, seed, horizon, rate = preference("t", objective=dpo(0.2)), 3, 5, 0.1
    generator = torch.Generator().manual_seed(int(hash64(torch.tensor([seed]))))
    params = {name: p.requires_grad_() for name, p in task.init(generator).items()}
    optimizer = torch.optim.Adam(params.values())
    for k in range(horizon):
        rows = sample_indices(torch.tensor([seed]), torch.tensor([k]), task.batch_size, len(task.train))[0]
        optimizer.param_groups[0]["lr"] = rate * (1 - k / horizon)
        optimizer.zero_grad()
        task.training_loss(params, {}, task.train.take(rows))[0].backward()
        optimizer.step()
    wanted = task.normalize(task.loss(params, task.valid.tensors)).item()
    objectives, scales, rates = [dpo(0.05), dpo(0.2)], (1.0, 4.0), (0.01, rate)
    found = train(task, objectives, horizon=horizon, seeds=(1, seed), scales=scales, rates=rates)
    assert found.shape == (2, 2, 2, 2)
    assert found[0, 1, 1, 1].item() == pytest.approx(wanted, abs=1e-5), "scale 4 of beta 0.05 is beta 0.2"
    assert found[1, 0, 1, 1].item() == pytest.approx(wanted, abs=1e-5)
    assert found[1, 0, 0, 1].item() != pytest.approx(wanted, abs=1e-3), "another learning rate"
    others = measured(
        task, objectives, "kl", "win_rate", horizon=horizon, seeds=(1, seed), scales=scales, rates=rates, split="test"
    )
    assert others[0, 0, 1, 1, 1].item() == pytest.approx(task.kl(params, task.test.tensors).item(), rel=1e-3)
    assert others[1, 0, 1, 1, 1].item() == pytest.approx(task.win_rate(params, task.test.tensors).item(), abs=1e-5)


def test_statistics_of_the_batch_are_of_one_run() -> None:
    centred = objective(read("def loss(rho):\n    return torch.square(rho - 3 - torch.tanh(rho.mean()))"))
    assert centred.batch_dependent
    task = preference("t")
    alone, beside = (
        train(task, [centred, dpo(0.05)], horizon=3, seeds=seeds, scales=(1.0,), rates=(0.1,))
        for seeds in ((5,), (5, 6))
    )
    torch.testing.assert_close(alone[..., 0], beside[..., 0], rtol=1e-4, atol=1e-5)


def test_of_many_losses_the_better_ones_reach_the_last_stage() -> None:
    targets = [*range(1, 12), *range(-11, 0)]
    scores = Judge(TINY).scores(
        [objective(read(f"def loss(rho):\n    return torch.square(rho - {k})")) for k in targets]
    )
    assert {score.stage for score in scores[11:]} == {0}, "they teach the rejected answers"
    reached = [score for score in scores if score.stage == 1]
    assert reached
    assert max(score.loss for score in reached) < min(score.loss for score in scores if score.stage == 0)
    assert all(score.low < score.loss < score.high for score in reached)


def test_searches_selections_and_reports_share_no_data() -> None:
    stages = [*search_stages(), judge_module.selection_stage(), report_stage()]
    data = [{regime.arguments["seed"] for regime in stage.regimes} for stage in stages]
    assert not data[1] & data[2] and not data[1] & data[3] and not data[2] & data[3]
    flips = [{regime.arguments.get("flips") for regime in stage.regimes} - {None} for stage in stages[1:]]
    assert not flips[0] & flips[1] and not flips[0] & flips[2] and not flips[1] & flips[2]


def test_intervals_are_those_of_student() -> None:
    # mean 2, standard deviation 1 of three: 4.302653 / sqrt 3
    assert margin_of(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.3026527 / 3**0.5, rel=1e-6)
    assert np.isnan(margin_of(np.array([1.0])))


# -- candidates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("def loss(rho, beta):\n    return torch.exp(-rho)", "inf at"),
        ("def loss(rho, beta):\n    return torch.sign(rho)", "derivative by rho is 0"),
        ("def loss(rho, beta):\n    return F.softplus(-beta * rho)", "the same as dpo"),
        ("def loss(rho, beta):\n    return open('x')", "open"),
        ("def loss(rho, beta):\n    return rho.mean()", "one per example"),
        ("def train(w, g, lr):\n    update = mul(g, lr)\n    return update", "a candidate is a function of rho"),
        ("[]", "1 to 64 statements"),
    ],
)
def test_what_is_wrong_is_said_in_words(source: str, wrong: str) -> None:
    validate = LossValidator()
    validate.remember(read(LOSS_SEEDS["dpo"]), "dpo")
    assert wrong in (validate(source) or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_printed_python_is_the_same_loss(name: str) -> None:
    args = ("rho, 0.7", "rho, 1.3", "rho, 0.3, rho")[max(LANGUAGE[name].arity, 1) - 1].split(", ")
    call = f"{name}({', '.join(args[: LANGUAGE[name].arity])})"
    genome = parse(f"def loss(rho):\n    x = {call}\n    y = mul(rho, -0.3)\n    loss = sub(x, y)\n    return loss\n")
    torch.testing.assert_close(value(read(python(genome))), value(genome), equal_nan=True, rtol=1e-12, atol=0)


# -- the mutator -----------------------------------------------------------------------------------------------------------


def test_a_join_is_the_weighted_mean() -> None:
    one, two = (read(LOSS_SEEDS[name]) for name in ("lrml", "slic"))
    torch.testing.assert_close(value(joined(one, two, 0.3)), 0.7 * value(one) + 0.3 * value(two))


def test_mutants_are_valid_new_and_the_same_for_the_same_request() -> None:
    validate = LossValidator()
    mutator = LossMutator(validate, seed=1)
    found = [mutator.propose(Request(k, "")) for k in range(12)]
    assert [validate(p.source) for p in found] == [None] * 12
    assert len({p.source for p in found}) > 8
    assert LossMutator(validate, seed=1).propose(Request(5, "")) == found[5]
    with pytest.raises(ProposerError, match="were not valid, the last: no"):
        LossMutator(lambda source: "no", attempts=3).propose(Request(0, ""))


# -- islands -------------------------------------------------------------------------------------------------------------


def test_parents_are_good_short_and_of_different_clusters() -> None:
    scores = [0.5, 0.5, 0.52, 0.9]
    members = [Member(s, {"t": s}, length) for s, length in zip(scores, (3, 30, 5, 2), strict=True)]
    islands = Islands(count=1, temperature=0.05, resolution=0.01)
    for k in range(4):
        islands.add(k, 0, members)
    rng = np.random.default_rng(0)
    drawn = [islands.parents(0, 2, members, rng) for _ in range(300)]
    firsts = [pair[0] for pair in drawn]
    assert all({0, 1} != {*pair} for pair in drawn), "these two are one cluster"
    assert firsts.count(0) > firsts.count(1) > 0
    assert firsts.count(3) < 10


def test_the_worse_half_of_the_islands_begins_again() -> None:
    members = [Member(score, {"t": score}, 1) for score in (0.9, 0.1, 0.2, 0.8, 0.7, 0.6)]
    islands = Islands(count=4, reset_every=6)
    for number, island in enumerate((0, 1, 2, 3, 0, 3)):
        islands.add(number, island, members)
    assert islands.state()["members"] == [[2], [1], [2], [1]]
    again = Islands(count=4, reset_every=6)
    again.restore(json.loads(json.dumps(islands.state())))
    assert again.state() == islands.state()


# -- the loop --------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """In place of a signal."""


class DyingJudge(Judge):
    """Dies when it is asked for the fourth time: the start, nobody while the first round is asked for, one round, and then."""

    asked = 0

    def scores(self, objectives: Sequence[Objective]) -> list[Score]:
        self.asked += 1
        if self.asked == 4:
            raise Killed
        return super().scores(objectives)


@contextmanager
def loop_in(
    directory: Path, judge: Judge, names: Sequence[str] = ("mutator",), **options: Any
) -> Iterator[tuple[Loop, Any]]:
    validator = LossValidator()
    with proposing(names, validator, directory, options=options) as (proposer, _):
        config = LoopConfig(
            "Learn.", tuple(names), judge.describe(), LOSS_SEEDS, batch=4, ahead=True, islands={"count": 2}
        )
        yield Loop(config, judge, proposer, validator, directory), proposer


def shown(candidates: Sequence[Candidate[Score]]) -> list[tuple[Any, ...]]:
    return [(c.name, c.source, c.genome, c.parents, c.proposal, c.score.loss) for c in candidates]


def test_a_killed_search_goes_on_to_the_same_champion(tmp_path: Path) -> None:
    with loop_in(tmp_path / "whole", Judge(TINY)) as (whole, _):
        whole.run(evaluations=12)
    with loop_in(tmp_path / "killed", DyingJudge(TINY)) as (dying, _), pytest.raises(Killed):
        dying.run(evaluations=12)
    with loop_in(tmp_path / "killed", Judge(TINY)) as (again, _):
        assert 0 < again.counts.evaluated < 12
        again.run(evaluations=12)
    assert shown(again.candidates) == shown(whole.candidates)
    islands = again._islands.state()["members"]
    assert isinstance(islands, list) and all(len(numbers) > len(LOSS_SEEDS) for numbers in islands), "all grow"
    kept = Archive(tmp_path / "killed", LossValidator.study, None).elites()
    assert {"dpo", "lrml"} <= {elite.facts["name"] for elite in kept}
    assert shown(LossValidator().load(tmp_path / "killed")) == shown(again.candidates)


def answers() -> Iterator[Any]:
    for k in itertools.count(2):
        yield proposes(f"def loss(rho, beta):\n    return F.softplus({k}.5 - beta * rho)", f"soft_{k}", "shifted")


def test_a_killed_search_pays_for_no_answer_twice(tmp_path: Path) -> None:
    with serving(answers()) as running:
        options = {"model": "tiny", "base_url": running.url, "key_env": "", "dialect": "other"}
        with loop_in(tmp_path, DyingJudge(TINY), ("openai",), **options) as (dying, _), pytest.raises(Killed):
            dying.run(evaluations=8)
        paid = len(running.seen)
        with loop_in(tmp_path, Judge(TINY), ("openai",), **options) as (again, _):
            again.run(evaluations=8)
    assert len(running.seen) == paid == 8
    assert again.counts.evaluated == again.counts.full + sum(c.score.stage == 0 for c in again.candidates) == 8
    assert again.counts.tokens == 8 * 120
    mine = [c for c in again.candidates if c.proposal is not None]
    assert all(
        c.source.startswith("def loss(rho, beta)") and c.proposal.thought == "shifted" for c in mine if c.proposal
    )
    archived = {e.facts["name"]: e for e in Archive(tmp_path, LossValidator.study, None).elites()}
    assert {c.name for c in mine} <= archived.keys(), "what a language model wrote is kept, however bad"


def test_a_mixture_is_told_and_goes_on_with_what_it_learned(tmp_path: Path) -> None:
    with serving(answers()) as running:
        options = {"model": "tiny", "base_url": running.url, "key_env": "", "dialect": "other"}
        with loop_in(tmp_path, Judge(TINY), ("mutator", "openai"), **options) as (loop, mixture):
            loop.run(evaluations=8)
            told = mixture.bandit.state()
        with loop_in(tmp_path, Judge(TINY), ("mutator", "openai"), **options) as (_, again):
            assert again.bandit.state() == told
    assert sum(arm["told"] for arm in told.values()) == 8 + loop.counts.known
    assert {c.proposal.proposer for c in loop.candidates if c.proposal} == {"mutator", "openai"}


def test_errors_become_notes_and_proposers_that_fail_end_the_search(tmp_path: Path) -> None:
    with serving([proposes("def loss(rho):\n    return -rho * rho * rho", "cubed")] * 12) as running:
        options = {"model": "tiny", "base_url": running.url, "key_env": "", "dialect": "other", "repairs": 0}
        with loop_in(tmp_path, Judge(TINY), ("openai",), **options) as (loop, _):
            loop._round(4)
            assert (len(loop._waiting), loop.counts.known) == (1, 3)
            loop._round(4)
        assert (loop.counts.evaluated, loop.counts.known, loop.counts.invalid) == (
            1,
            7,
            0,
        )  # its author was told, and did not mend it
        assert "cubed: it computes the same as cubed" in running.seen[-1].text
    made = LossValidator()
    failing = LossMutator(lambda source: "no", attempts=1)
    dead = Loop(
        LoopConfig("", ("mutator",), Judge(TINY).describe(), LOSS_SEEDS), Judge(TINY), failing, made, tmp_path / "dead"
    )
    with pytest.raises(ProposerError, match="not valid"):
        dead.run(evaluations=3)


def test_the_winner_is_selected_on_other_tasks() -> None:
    class Fixed(Judge):
        def scores_on(self, stage: Stage, objectives: Sequence[Objective]) -> list[Score]:
            return [Score(loss, 0, {}, 0, 0, 2.0, 0.1) for loss in (0.3, 0.1, 0.2)[: len(objectives)]]

    genome = parse(LOSS_SEEDS["dpo"])
    candidates = [Candidate(k, f"c{k}", "", genome, Score(k / 10, 0, {}, 0, 0, 1.0, 0.1)) for k in range(3)]
    assert select(candidates, Fixed(TINY), TINY[0]).candidate.name == "c1"
    assert select(candidates, Fixed(TINY), TINY[0], most=1).candidate.name == "c0"


# -- commands ----------------------------------------------------------------------------------------------------------------


def test_a_search_on_the_command_line_and_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_module, "search_stages", lambda: TINY)
    monkeypatch.setattr(judge_module, "selection_stage", lambda: TINY[0])
    out = tmp_path / "x"
    assert main(["discover", "loss", "--budget", "6", "--batch", "3", "--out", str(out)]) == 0
    told = capsys.readouterr().err
    assert "trained with" in told and "def loss(rho):" in told
    report = json.loads((out / "report.json").read_text())
    assert report["counts"]["evaluated"] == 6
    name = LossValidator().load(out)[-1].name
    assert main(["show", name, "--from", str(out)]) == 0
    text = capsys.readouterr().out
    assert "def loss(rho):" in text and "loss of the policy" in text and "by start" in text
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "search.png").is_file() and "return" in (out / "champion.py").read_text()
    assert main(["show", "nobody", "--from", str(out)]) != 0
    assert "no candidate 'nobody'" in (told := capsys.readouterr().err) and "the best are " in told
    archived = (out / "study.log").read_bytes()
    for command in (["simplify", str(out)], ["discover", "funnel", str(out)]):
        assert main(command) == 2
        assert "holds no search of metaopt discover rule" in " ".join(capsys.readouterr().err.split())
    assert (out / "study.log").read_bytes() == archived


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (["discover", "rule", "--searcher", "openai"], "openai is no searcher; choose from"),
        (["discover", "loss", "--proposer", "evolution"], "evolution writes no texts of candidates; choose from"),
        (["discover", "loss", "--set", "model=x"], "are of language models"),
        (["discover", "loss", "--proposer", "mutator,mutator"], "a proposer takes part once"),
        (["discover", "loss", "--task", "digits"], "for the task preference, got 'digits'"),
        (["discover", "loss", "--proposer", "openai", "--money", "1"], "money is counted by prices per million tokens"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(
    command: list[str], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path / "x")]) != 0
    assert wrong in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
