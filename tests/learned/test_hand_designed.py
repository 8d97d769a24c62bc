"""Learned hyperparameters and schedules of hand-designed rules against the rules themselves, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from rule_strategies import Problem, make_problem
from torch import Tensor

import metaopt
from metaopt import registry
from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, Params, PerParameter, State, UpdateRule, infer_info
from metaopt_learned.hand_designed import LearnedHyperparameters, LearnedSchedule

SHAPES = ((3, 4), (5,), ())
T = 12


def run(rule: UpdateRule, given: Problem, hp: Any = None) -> Params:
    params, state = given.params, rule.init(given.params, given.info)
    for t, grads in enumerate(given.grads):
        ctx = Context(given.info, step=torch.tensor(t), horizon=T)
        params, state = rule.update(grads, state, params, rule.hp if hp is None else hp, ctx)
    return params


def given(steps: int = 6) -> Problem:
    return make_problem(None, torch.float64, SHAPES, steps, seed=0, decades=(-2.0, 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "rule", "values"),
    [
        ("learnable_sgd", "sgd", {"lr": 0.3}),
        ("learnable_momentum", "momentum", {"lr": 0.02, "momentum": 0.7}),
        ("learnable_adam", "adam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}),
    ],
)
def test_learned_values_act_as_the_same_hyperparameters_do(name: str, rule: str, values: dict[str, Any]) -> None:
    learned: LearnedRule = registry.create("learned_optimizer", name)
    fresh = learned.init_theta(torch.Generator())
    assert sum(value.numel() for value in fresh.values()) == {"sgd": 1, "momentum": 2, "adam": 4}[rule]
    raw = {
        "lr": lambda x: math.log(x),
        "eps": lambda x: math.log(x),
        "momentum": lambda x: math.log(1 - x),
        "betas": lambda x: [math.log(1 - b) for b in x],
    }
    theta = {key: torch.tensor(raw[key](value), dtype=torch.float64) for key, value in values.items()}
    assert theta.keys() == fresh.keys()
    wanted = run(registry.create("optimizer", rule, **values), given())
    torch.testing.assert_close(run(learned.bind(theta), given()), wanted, rtol=1e-12, atol=1e-13)
    halved = run(registry.create("optimizer", rule, **{**values, "lr": values["lr"] / 2}), given())
    torch.testing.assert_close(run(learned.bind(theta), given(), {"lr": 0.5}), halved, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("learned", [LearnedHyperparameters(rule="adam", learned="lr, betas"), LearnedSchedule()])
@pytest.mark.parametrize("rule", ["adam", "lion", "adafactor", "muon"])
def test_fresh_theta_is_the_registered_rule(learned: LearnedRule, rule: str) -> None:
    """Theta is float32: its logarithms are off by 1e-7 of their size, which is 10 at most."""
    names = ",".join(n for n in ("lr", "betas") if n in registry.create("optimizer", rule).hp)
    learned = learned.replaced(rule=rule, learned=names)
    found = run(learned.bind(learned.init_theta(torch.Generator())), given())
    wanted = run(registry.create("optimizer", rule), given())
    for key, p in given().params.items():
        assert (found[key] - wanted[key]).abs().max() <= 3e-6 * (wanted[key] - p).abs().max()


def test_schedule_is_the_piecewise_linear_function_of_progress() -> None:
    """With SGD on a gradient of 1, the moves are minus the learning rates; beyond the horizon the last one holds."""
    generator = torch.Generator().manual_seed(0)
    theta = {"lr": torch.randn(5, generator=generator, dtype=torch.float64)}
    rule = LearnedSchedule(rule="sgd", knots=5).bind(theta)
    params = {"p": torch.zeros(1, dtype=torch.float64)}
    info = infer_info(params)
    for shared in (True, False):
        now, state, found = params, rule.init(params, info), []
        for t in range(T + 3):
            ctx = Context(info, step=torch.tensor(t) if shared else None, horizon=torch.tensor(T))
            after, state = rule.update({"p": torch.ones(1, dtype=torch.float64)}, state, now, rule.hp, ctx)
            found.append(float(now["p"] - after["p"]))
            now = after
        wanted = np.exp(np.interp(np.arange(T + 3) / T * 4, np.arange(5), theta["lr"].numpy()))
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_parameters_late_to_training_follow_their_own_clock_and_group() -> None:
    theta = {"lr": torch.tensor([0.0, -1.0, -2.0])}
    rule = LearnedSchedule(rule="sgd", knots=3).bind(theta)
    params = {name: torch.zeros(2) for name in ("early", "late")}
    info = infer_info(params)
    state: State = {**rule.init(params, info)}
    state["early"]["step"] = torch.tensor(5)
    hp = PerParameter({"early": {"lr": 1.0}, "late": {"lr": 3.0}})
    new, _ = rule.update({n: torch.ones(2) for n in params}, state, params, hp, Context(info, horizon=10))
    torch.testing.assert_close(new["early"], torch.full((2,), -math.exp(-1.0)))
    torch.testing.assert_close(new["late"], torch.full((2,), -3.0))


def test_meta_gradient_of_gradient_descent_has_its_closed_form() -> None:
    """x_T = (1 - eta a)^T x_0 with eta = e^theta, so d x_T / d theta = -T eta a (1 - eta a)^(T - 1) x_0."""
    a, x0, eta, steps = 0.7, 2.0, 0.4, 5
    learned = LearnedHyperparameters(rule="sgd")
    theta: Theta = {"lr": torch.tensor(math.log(eta), dtype=torch.float64, requires_grad=True)}
    params = {"x": torch.tensor([x0], dtype=torch.float64)}
    info = infer_info(params)
    state = learned.init(params, info, theta)
    for t in range(steps):
        grads = {"x": a * params["x"]}
        params, state = learned.update(theta, grads, state, params, learned.hp, Context(info, step=torch.tensor(t)))
    params["x"].sum().backward()
    assert float(params["x"].detach()) == pytest.approx((1 - eta * a) ** steps * x0, rel=1e-12)
    gradient = theta["lr"].grad
    assert gradient is not None
    assert float(gradient) == pytest.approx(-steps * eta * a * (1 - eta * a) ** (steps - 1) * x0, rel=1e-10)


def test_learned_rate_of_one_step_becomes_the_inverse_curvature() -> None:
    a = 3.0
    learned = LearnedHyperparameters(rule="sgd")
    theta = {key: value.requires_grad_() for key, value in learned.init_theta(torch.Generator()).items()}
    params = {"x": torch.ones(1)}
    info = infer_info(params)
    outer = torch.optim.Adam(theta.values(), lr=0.1)
    for _ in range(200):
        state = learned.init(params, info, theta)
        ctx = Context(info, step=torch.tensor(0))
        after, _ = learned.update(theta, {"x": a * params["x"]}, state, params, learned.hp, ctx)
        outer.zero_grad()
        (0.5 * a * after["x"].square()).sum().backward()
        outer.step()
    assert float(theta["lr"].detach().exp()) == pytest.approx(1 / a, rel=1e-2)


@pytest.mark.parametrize("u", [-80.0, 5.0, 60.0])
def test_values_never_leave_their_domain(u: float) -> None:
    """A perturbed theta may be anything: 1 - e^u must stay in [0, 1), where Adam's bias correction is finite."""
    learned = LearnedHyperparameters(rule="adam", learned="lr,betas")
    raw = {"lr": torch.tensor(0.0), "betas": torch.tensor([u, u])}
    beta: Tensor
    for beta in learned.hyperparameters(raw, 1.0)["betas"]:
        assert 0 <= float(beta) < 1
    assert all(p.isfinite().all() for p in run(learned.bind(raw), given()).values())


def test_what_cannot_be_learned_is_refused_at_the_door() -> None:
    with pytest.raises(ValueError, match=r"no optimizer is called 'adan'.*'adam'"):
        LearnedHyperparameters(rule="adan")
    with pytest.raises(ValueError, match=r"no optimizer is called 'os:getcwd'"):
        LearnedHyperparameters(rule="os:getcwd")
    with pytest.raises(ValueError, match=r"hyperparameters of 'adam' \(lr, betas, eps, weight_decay\).*no 'momentum'"):
        LearnedSchedule(rule="adam", learned="lr,momentum")
    with pytest.raises(ValueError, match=r"no 'nesterov'"):
        LearnedHyperparameters(rule="sgd", learned="nesterov")
    with pytest.raises(ValueError, match=r"weight_decay cannot be learned: its default is 0.*log scale"):
        LearnedHyperparameters(rule="adam", learned="weight_decay")
    learned = LearnedSchedule(rule="sgd")
    bound = learned.bind(learned.init_theta(torch.Generator()))
    with pytest.raises(ValueError, match="horizon"):
        metaopt.optimizer(bound, [torch.zeros(2)])
    params = {"p": torch.zeros(2)}
    info = infer_info(params)
    with pytest.raises(ValueError, match="horizon"):
        bound.update(params, bound.init(params, info), params, bound.hp, Context(info))
