"""Distillation: hidden formulas come back and are verified; what is no formula is said to be none."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metaopt import registry
from metaopt.cli import main
from metaopt.objective import Objective
from metaopt.program import evaluate
from metaopt.resolve import resolve_rule
from metaopt.rule import ElementwiseRule
from metaopt_symbolic.distill import distil, objectives, optimizers, report
from metaopt_symbolic.distill.fit import (
    FLOOR,
    Fit,
    Front,
    error_of,
    polished,
    rounded,
    search,
    shortened,
    small_formulas,
    weighted,
)
from metaopt_symbolic.distill.objectives import ObjectiveTarget, assembled, pieces, sample, slopes
from metaopt_symbolic.distill.pursuit import pursue
from metaopt_symbolic.distill.verify import Agreement, Check, Verdict, verify_objective, verify_optimizer
from metaopt_symbolic.genome import Assign, Genome, from_json, parse
from metaopt_symbolic.objective_file import objective_source
from metaopt_symbolic.search import Budget, Counts
from metaopt_symbolic.suites import tasks_of


def objective(name: str, **options: Any) -> Objective:
    made = registry.create("objective", name, **options)
    assert isinstance(made, Objective)
    return made


def target_of(name: str, **options: Any) -> ObjectiveTarget:
    made = objective(name, **options)
    return ObjectiveTarget(made, pieces(made)[0])


class Opaque(Objective):
    """A loss of rho that no tracer reads, and whose numbers are none of ours."""

    kind = "preference"
    inputs = ("rho",)

    def loss(self, rho: Tensor) -> Tensor:
        knots = torch.linspace(-80, 80, 8001, dtype=rho.dtype)
        slope = -0.3 / (1 + torch.exp(0.3 * knots))
        at = torch.clamp((rho.detach() + 80) / 0.02, 0, 7999).long()
        part = (rho.detach() - knots[at]) / 0.02
        return rho * (slope[at] + part * (slope[at + 1] - slope[at]))


# -- numbers -------------------------------------------------------------------------------------------------------------


def test_numbers_are_fitted_to_those_of_the_target() -> None:
    fit = polished(target_of("dpo", beta=0.3), parse("def loss(rho):\n    z = mul(rho, 1.0)\n    z = logsigmoid(z)\n"
                                                     "    loss = mul(z, -5.0)\n    return loss\n"))  # fmt: skip
    assert fit.error < FLOOR
    (_, (_, beta)), _, (_, (_, factor)) = ((a.function, a.args) for a in fit.genome.body)
    # the slope is beta sigmoid(-beta rho)
    assert (beta, factor) == pytest.approx((0.3, -1.0), rel=1e-4)


def test_an_error_is_what_is_missing_in_units_of_the_target() -> None:
    target = target_of("mse")  # of slope 2 e
    program = parse("def loss(prediction, target):\n    e = sub(prediction, target)\n    e = square(e)\n"
                    "    loss = mul(e, 0.75)\n    return loss\n").program()  # fmt: skip
    assert error_of(target, program) == pytest.approx(0.25)


def test_weights_change_no_structure_of_one_input() -> None:
    genome = parse("def loss(rho):\n    z = tanh(rho)\n    loss = sub(rho, z)\n    return loss\n")
    body = weighted(genome, {"rho": 4.0}).body
    assert [a.function for a in body] == ["mul", "tanh", "mul", "mul", "sub"]
    assert [a.args[1] for a in body if a.function == "mul"] == [0.25, 0.25, 1.0]


def test_the_knee_is_where_errors_stop_to_fall() -> None:
    front = Front()
    formulas = sorted(small_formulas(("rho",)), key=lambda g: len(g.body))
    lengths = {len(g.body): g for g in formulas}
    for length, error in {1: 0.5, 2: 0.011, 3: 0.01}.items():
        front.add(Fit(lengths[length], error))
    front.add(Fit(lengths[3], 0.4))
    assert [fit.error for fit in front.fits] == [0.5, 0.011, 0.01]
    assert front.knee.error == 0.011


# -- objectives ----------------------------------------------------------------------------------------------------------


def test_a_loss_behind_its_slopes_is_found() -> None:
    made = objective("ipo", beta=0.2)  # (rho - 2.5)^2
    front = search(target_of("ipo", beta=0.2), objectives.starts(made), Budget(unique=300), functions="losses")
    assert front.best.error < FLOOR


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    generations: list[int] = []

    def found(file: Path | None, stop: int = -1, seed: int = 0) -> list[Fit]:
        def on_generation(_: Front, counts: Counts) -> None:
            generations.append(counts.generations)
            if counts.generations == stop:
                signal.raise_signal(signal.SIGINT)

        starts = [*small_formulas(("rho",))][::20]
        budget = Budget(children=600)
        return search(
            target_of("lrml"), starts, budget, functions="losses", seed=seed, file=file, on_generation=on_generation
        ).fits

    whole = found(None)
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            found(tmp_path / "piece.npz", stop)
    assert found(tmp_path / "piece.npz") == whole and len(whole) > 2
    assert generations == 2 * [1, 2, 3, 4, 5, 6], "none twice"
    with pytest.raises(ValueError, match="of another target, seed or tasks"):
        found(tmp_path / "piece.npz", seed=1)


def test_a_distillation_that_was_killed_goes_on_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = ["distill", f"{__file__}:Opaque", "--budget", "220", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(distil, "shortened", stops)  # after the search
        assert main([*command, str(tmp_path / "again")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "again").iterdir()] == ["piece-0.npz"]
    assert main([*command, str(tmp_path / "again")]) == 0
    whole, again = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "again"))
    assert whole == again and "piece-0.npz" not in again


def test_a_steep_part_beside_a_flat_one_is_a_term_of_its_own() -> None:
    """The switch of LRML is twenty times narrower than the range; no formula of one small term comes near."""
    target, front = target_of("lrml"), Front()
    starts = [
        g
        for g in small_formulas(("rho",))
        if {a.function for a in g.body} <= {"sigmoid", "arctan", "tanh", "add", "sub"}
    ]
    pursue(target, starts, front, tolerance=0.05, more=1)
    alone = min(polished(target, weighted(genome, target.sizes)).error for genome in starts)
    assert front.best.error < 0.05 < 0.25 < alone
    assert error_of(target, front.best.genome.program()) == pytest.approx(front.best.error)


def test_slopes_of_a_drift_are_those_of_what_is_above_the_surrogate() -> None:
    made = objective("ppo_penalty", beta=2.0)
    points = sample(made, 50, seed=3)
    wanted = 2 * (1 - 1 / points["ratio"])
    assert torch.allclose(slopes(made, points)[0], wanted, rtol=1e-10)


def test_formulas_of_both_signs_of_the_advantage_become_one_drift(tmp_path: Path) -> None:
    def formula(x: str, a: float) -> Genome:  # x - a tanh(x / a), as in Lu et al. 2022
        body = (Assign("y", "mul", (x, 1 / a)), Assign("y", "tanh", ("y",)), Assign("y", "mul", ("y", a)))
        return Genome(objectives.DRIFT_FEATURES, (), ("loss",), (*body, Assign("loss", "sub", (x, "y"))))

    target = objective("discovered_policy", alpha=2.0, beta=0.6)
    genomes = [formula("ua", 2.0), formula("va", 0.6)]
    path = tmp_path / "closed_form.py"
    path.write_text(objective_source(assembled(target, genomes), "rl", "ClosedForm", "As published."))
    closed = objective(f"{path}:ClosedForm")
    points = sample(target, 500, seed=1)
    # float64, sums in another order
    assert torch.allclose(closed(points), target(points), rtol=1e-12, atol=1e-12)
    assert verify_objective(target, closed, tolerance=0.001, seed=0).verified


def fitted_drift_network() -> Objective:
    """LPO's network, its last layer fitted to noisy values of the drift of discovered policy optimisation."""
    network: Any = objective("learned_policy", hidden=256)
    generator = torch.Generator().manual_seed(0)
    ratio = torch.exp(2.4 * torch.rand(40000, generator=generator) - 1.2)
    advantage = 8 * torch.rand(40000, generator=generator) - 4
    u, v, one = 1 - ratio, ratio.log(), torch.ones_like(ratio)
    good, bad = -u * advantage, v * advantage
    drift = torch.where(advantage >= 0, good - 2 * torch.tanh(good / 2), bad - 0.6 * torch.tanh(bad / 0.6))
    noisy = (drift + 0.01 * torch.randn(40000, generator=generator)).double()
    features = torch.stack([f * a for f in (u, u * u, v, v * v) for a in (one, advantage)], -1)
    units = torch.tanh(features @ network.first.T).double()
    ridge = 0.01 * torch.eye(256, dtype=torch.float64)
    network.last.copy_(torch.linalg.solve(units.T @ units + ridge, units.T @ noisy))
    assert isinstance(network, Objective)
    return network


def test_the_network_of_lpo_becomes_the_formula_of_dpo(tmp_path: Path) -> None:
    network = fitted_drift_network()
    chosen = []
    # small formulas of the right feature alone: the command looks through those of all five
    for piece, feature in zip(pieces(network), ("ua", "va"), strict=True):
        target = ObjectiveTarget(network, piece)
        starts = [Genome(objectives.DRIFT_FEATURES, (), g.outputs, g.body) for g in small_formulas((feature,))]
        front = search(target, starts, Budget(unique=1), functions="losses")
        shortened(target, front)
        chosen.append(rounded(target, front.knee, 0.002).genome)
    assert [[a.function for a in genome.body if a.function == "tanh"] for genome in chosen] == [["tanh"], ["tanh"]]
    path = tmp_path / "closed_form.py"
    path.write_text(objective_source(assembled(network, chosen), "rl", "ClosedForm", "Found."))
    closed = objective(f"{path}:ClosedForm")
    verdict = verify_objective(network, closed, tolerance=0.03, seed=0)  # the network's own noise is 0.02
    assert verdict.verified, verdict.text
    points = sample(network, 500, seed=1)
    hidden = slopes(objective("discovered_policy", alpha=2.0, beta=0.6), points)
    # numbers of two digits
    assert (slopes(closed, points) - hidden).abs().mean() < 0.02 * hidden.abs().mean()


def test_another_formula_is_not_verified() -> None:
    verdict = verify_objective(objective("dpo", beta=0.1), objective("dpo", beta=0.11), tolerance=0.02, seed=0)
    assert not verdict.verified
    assert verdict.text.startswith("not verified: mean error inside is 0.")
    assert verify_objective(objective("dpo", beta=0.1), objective("dpo", beta=0.1001), tolerance=0.02, seed=0).verified


def test_agreement_is_in_units_of_the_target() -> None:
    wanted = torch.tensor([1.0, -3.0, 0.0])
    found = Agreement.of("here", wanted + torch.tensor([0.0, 0.6, 0.6]), wanted)
    assert (found.mean, found.largest) == pytest.approx((0.3, 0.2))
    assert found.r2 == pytest.approx(1 - 0.72 / 10)
    nothing = Agreement.of("here", torch.full((3,), torch.nan), wanted)
    assert not Verdict((nothing,), (Check("mean", nothing.mean, 1.0),)).verified
    assert not Check("nothing", float("nan"), 1.0).passed


@pytest.mark.parametrize("name", ["cross_entropy", "self_paced"])
def test_what_has_no_slope_of_one_example_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="give an objective of kind preference, regression or rl"):
        pieces(objective(name))


# -- optimizers ----------------------------------------------------------------------------------------------------------


def test_recorded_updates_are_those_of_the_rule() -> None:
    tasks = dict([*tasks_of("search").items()][:2])
    rule = resolve_rule("sgd", lr=0.03)
    recorded = optimizers.record(rule, tasks, steps=5, seed=1)
    # float32 parameters: what is subtracted is rounded to their digits
    assert torch.allclose(recorded.updates * recorded.units, 0.03 * recorded.grads, atol=1e-7)
    assert torch.allclose(recorded.updates.square().mean(0), torch.ones_like(recorded.units))


def test_the_decay_of_a_hidden_momentum_is_found() -> None:
    tasks = dict([*tasks_of("search").items()][:1])
    target = optimizers.OptimizerTarget(
        optimizers.record(resolve_rule("momentum", lr=0.02, momentum=0.7), tasks, steps=20, seed=0)
    )
    momentum = optimizers.starts()[0]
    fit = polished(target, momentum)
    assert fit.error < 1e-3  # of float32 parameters
    assert [a.args[2] for a in fit.genome.body if a.function == "interpolate"] == [pytest.approx(0.7, abs=1e-3)]


def test_a_distilled_rule_has_a_learning_rate() -> None:
    head = "def train(w, g, m, lr):\n    m = interpolate(g, m, 0.9)\n"
    for last in ("update = mul(m, 0.02)", "m = mul(m, 0.02)\n    update = copy(m)"):
        genome = optimizers.with_rate(parse(f"{head}    {last}\n    return update, m\n"))
        w, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])
        columns = {"param": w, "grad": g, "m": torch.zeros(2)}
        after = {lr: evaluate(genome.program(), columns, {"lr": lr})[0] for lr in (1.0, 2.0)}
        # 0.1 * 0.02 of the gradient
        torch.testing.assert_close(w - after[1.0], 0.002 * g)
        torch.testing.assert_close(w - after[2.0], 0.004 * g)


def test_a_rule_is_verified_where_it_was_not_fitted_and_another_is_not() -> None:
    tasks = tasks_of("search")
    fitted, others = ({name: tasks[name]} for name in [*tasks][:2])
    adam, other = resolve_rule("adam", lr=0.01), resolve_rule("adam", lr=0.01, betas=(0.8, 0.999))
    assert isinstance(adam, ElementwiseRule) and isinstance(other, ElementwiseRule)
    assert verify_optimizer(adam, adam, fitted, others, tolerance=0.01, seed=0).verified
    assert not verify_optimizer(adam, other, fitted, others, tolerance=0.01, seed=0).verified


def test_formulas_of_a_report_are_read_back() -> None:
    """Also those of drifts, whose features a text does not tell from numbers."""
    fits = [Fit(genome, 1 / (k + 1)) for k, genome in enumerate(small_formulas(objectives.DRIFT_FEATURES))][::200]
    front = Front()
    for fit in fits:
        front.add(fit)
    told = json.loads(report.facts({}, {"drift": front}, {"drift": front.best}, Verdict((), ())))["pieces"]["drift"]
    assert [from_json(row["genome"]) for row in told["front"]] == [fit.genome for fit in front.fits]
    assert from_json(told["chosen"]["genome"]) == front.best.genome
    assert front.best.genome.tensors == objectives.DRIFT_FEATURES


# -- the command ---------------------------------------------------------------------------------------------------------


def test_an_opaque_loss_becomes_a_file_that_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["distill", f"{__file__}:Opaque", "--budget", "300", "--out", str(out)]) == 0
    told = json.loads((out / "report.json").read_text())
    assert told["verified"], told["verdict"]
    assert (out / "closed_form.png").read_bytes().startswith(b"\x89PNG")
    closed = objective(f"{out / 'closed_form.py'}:ClosedForm")
    rho = torch.linspace(-20, 20, 9, dtype=torch.float64)
    wanted = -0.3 / (1 + np.exp(0.3 * rho.numpy()))
    found = slopes(closed, {"rho": rho})[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=0.02 * 0.15)
    assert "verified" in capsys.readouterr().err


def test_an_unknown_target_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "adamm", "--out", str(tmp_path)]) != 0
    assert "adamm" in capsys.readouterr().err
