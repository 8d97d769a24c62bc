"""Schedules against torch's own schedulers, and learning rates by role against param groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import metaopt
from metaopt import registry
from metaopt.rule import Context, infer_info
from metaopt_classic.learning_rates import ByRole, Scheduled
from metaopt_classic.sgd import SGD

STEPS = 20


def rates(rule: Scheduled) -> list[float]:
    """The learning rate of every step: SGD's steps under a gradient of 1."""
    params = {"w": torch.zeros((), dtype=torch.float64)}
    info = infer_info(params)
    state, found = rule.init(params, info), []
    for step in range(STEPS):
        ctx = Context(info, step=torch.tensor(step), horizon=STEPS)
        new, state = rule.update({"w": torch.ones((), dtype=torch.float64)}, state, params, rule.hp, ctx)
        found.append(float(params["w"] - new["w"]))
        params = new
    return found


def of_torch(make: object) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    scheduler, found = make(optimizer), []  # type: ignore[operator]
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_and_linear_are_torchs() -> None:
    schedulers = torch.optim.lr_scheduler
    cosine = Scheduled(SGD(lr=0.5), schedule="cosine", warmup=0.0, final_lr=0.1)
    assert rates(cosine) == pytest.approx(of_torch(lambda o: schedulers.CosineAnnealingLR(o, STEPS, eta_min=0.05)))
    linear = Scheduled(SGD(lr=0.5), schedule="linear", warmup=0.0, final_lr=0.2)
    assert rates(linear) == pytest.approx(of_torch(lambda o: schedulers.LinearLR(o, 1.0, 0.2, STEPS)))


def test_warm_up_and_the_last_fifth() -> None:
    shape = rates(Scheduled(SGD(lr=1.0), schedule="wsd", warmup=0.25, final_lr=0.0))
    assert shape[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shape[5:17] == pytest.approx([1.0] * 12)
    # the cooldown is a fifth of what follows the warm-up: 3 of 15 steps
    assert shape[17:] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert rates(Scheduled(SGD(lr=1.0), schedule="constant", warmup=0.0, final_lr=0.0)) == [1.0] * STEPS


def test_a_schedule_needs_the_horizon() -> None:
    params = {"w": torch.zeros(1)}
    rule = Scheduled(SGD())
    with pytest.raises(ValueError, match="pass horizon="):
        rule.update(params, rule.init(params, infer_info(params)), params, rule.hp, Context(infer_info(params)))


def test_rates_by_role_are_those_of_param_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    twin.load_state_dict(model.state_dict())
    # 0.weight is hidden here (no name says input), 2.weight the output, the rest biases
    ours = metaopt.optimizer(ByRole(SGD(lr=0.1), output_lr=3.0, vector_lr=0.5), model)
    factor = {"0.weight": 1.0, "2.weight": 3.0, "0.bias": 0.5, "2.bias": 0.5}
    theirs = torch.optim.SGD([{"params": [p], "lr": 0.1 * factor[name]} for name, p in twin.named_parameters()])
    inputs = torch.randn(8, 3)
    for _ in range(3):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_wrappers_nest_and_are_registered() -> None:
    rule = registry.create("optimizer", "scheduled", rule=registry.create("optimizer", "by_role", rule="lion"), lr=1e-3)
    assert {"schedule", "output_lr", "lr", "betas"} <= set(rule.declared())
    assert rule.hp["lr"] == 1e-3 and math.isclose(rule.hp["vector_lr"], 1.0)
