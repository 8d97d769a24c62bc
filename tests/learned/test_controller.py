"""The learned controller against a restatement in numpy, and what it does for training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learned_cases import noisy_theta, values
from torch import Tensor

import metaopt
from metaopt import registry
from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, infer_info
from metaopt_learned.controller import Controller

SHAPES = {"w": (3, 4), "b": (4,)}
HORIZON, STEPS = 9, 7


def loss_at(t: int) -> float:
    return 2.0 / (1 + t) + 0.3 * (-1) ** t


def log_rms(arrays: list[np.ndarray]) -> float:
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    return 0.5 * np.log(np.mean(flat**2) + 1e-16)


class Policy:
    """The class's docstring, for SGD whose lr and momentum are learned."""

    def __init__(self, theta: Theta, params: dict[str, np.ndarray]) -> None:
        self.theta = {key: value.numpy() for key, value in theta.items()}
        self.params, self.buffers = params, {n: np.zeros_like(p) for n, p in params.items()}
        self.change, self.moved = np.zeros(2), 0.0

    def step(self, t: int, grads: dict[str, np.ndarray], loss: float) -> None:
        decays = np.array([0.5, 0.9, 0.99]) * (t > 0)
        self.means = decays * (self.means if t else 0) + (1 - decays) * loss
        keep = 0.9 * (t > 1)
        self.spread = keep * (self.spread if t else 0) + (1 - keep) * abs(loss - self.means[1])
        sizes = np.array([log_rms(list(grads.values())), self.moved])
        self.sizes = keep * (self.sizes if t else 0) + (1 - keep) * sizes
        trend = (np.array([loss, *self.means[:2]]) - self.means) / (self.spread + 1e-8)
        seen = np.concatenate([
            [2 * min(t / HORIZON, 1) - 1], np.tanh(trend), sizes / 10, np.tanh(sizes - self.sizes), np.tanh(self.change)
        ])  # fmt: skip
        layer = np.maximum(seen @ self.theta["policy.w0"] + self.theta["policy.b0"], 0)
        action = np.tanh(layer @ self.theta["policy.w1"] + self.theta["policy.b1"])
        self.change = np.clip(self.change + 0.1 * action, -np.log(1e4), np.log(1e4))
        lr = np.exp(self.theta["lr"] + self.change[0])
        momentum = max(1 - np.exp(self.theta["momentum"] + self.change[1]), 0)
        moves = []
        for name, p in self.params.items():
            self.buffers[name] = momentum * self.buffers[name] + grads[name]
            moves.append(-lr * self.buffers[name])
            self.params[name] = p + moves[-1]
        self.moved = log_rms(moves)


@pytest.mark.parametrize("scope", ["run", "tensor"])
@pytest.mark.parametrize("shared_step", [True, False])
def test_controller_is_what_its_docstring_says(scope: str, shared_step: bool) -> None:
    learned = Controller(rule="momentum", learned="lr,momentum", scope=scope)
    theta = noisy_theta(learned, 0.5)
    params = values(1, SHAPES)
    info = infer_info(params)
    state = learned.init(params, info, theta)
    groups = [["w", "b"]] if scope == "run" else [["w"], ["b"]]
    policies = [Policy(theta, {n: params[n].numpy() for n in names}) for names in groups]
    for t in range(STEPS):
        grads = values(100 + t, SHAPES)
        step, loss = torch.tensor(t) if shared_step else None, torch.tensor(loss_at(t), dtype=torch.float64)
        ctx = Context(info, step=step, loss=loss, horizon=HORIZON)
        params, state = learned.update(theta, grads, state, params, learned.hp, ctx)
        for policy, names in zip(policies, groups, strict=True):
            policy.step(t, {n: grads[n].numpy() for n in names}, loss_at(t))
            for name in names:
                np.testing.assert_allclose(params[name].numpy(), policy.params[name], rtol=1e-10, atol=1e-12)
                np.testing.assert_allclose(state[name]["policy.change"].numpy(), policy.change, rtol=1e-10)
    assert (scope == "run") == torch.equal(state["w"]["policy.change"], state["b"]["policy.change"])


def test_fresh_controller_is_the_registered_rule() -> None:
    learned: LearnedRule = registry.create("learned_optimizer", "controller", rule="adam", learned="lr,betas")
    rules = [learned.bind(learned.init_theta(torch.Generator().manual_seed(0))), registry.create("optimizer", "adam")]
    found = []
    for rule in rules:
        params = values(1, SHAPES)
        info = infer_info(params)
        state = rule.init(params, info)
        for t in range(STEPS):
            ctx = Context(info, step=torch.tensor(t), loss=torch.tensor(loss_at(t)), horizon=HORIZON)
            params, state = rule.update(values(100 + t, SHAPES), state, params, rule.hp, ctx)
        found.append(params)
    for name, p in values(1, SHAPES).items():
        assert (found[0][name] - found[1][name]).abs().max() <= 3e-6 * (found[1][name] - p).abs().max()  # float32 theta


def test_policy_state_of_the_run_survives_parameters_that_miss_steps() -> None:
    """The first parameter has no gradient for two steps: the others' policy goes on, and takes it along again."""
    learned = Controller(rule="sgd")
    theta = noisy_theta(learned, 0.5)
    params = {name: p.float().requires_grad_() for name, p in values(1, SHAPES).items()}
    optimizer = metaopt.optimizer(learned.bind(theta), list(params.items()), horizon=HORIZON)
    seen = []
    for t in range(STEPS):
        for name, p in params.items():
            p.grad = None if name == "w" and t in (2, 3) else values(100 + t, SHAPES)[name].float()
        optimizer.step(loss=loss_at(t))
        seen.append([optimizer.state[p]["policy.change"].clone() for p in params.values()])
    assert torch.equal(seen[3][0], seen[1][0]) and not torch.equal(seen[3][1], seen[1][1])
    assert torch.equal(seen[4][0], seen[4][1])
    assert 0 < float((seen[4][1] - seen[3][1]).abs()) <= 0.1 + 1e-6, (
        "one step from where the policy was, not from the past"
    )


def test_missing_loss_or_horizon_is_refused() -> None:
    learned = Controller()
    rule = learned.bind(learned.init_theta(torch.Generator()))
    assert rule.requirements() == {"loss", "horizon"}
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="horizon"):
        metaopt.optimizer(rule, [weight])
    optimizer = metaopt.optimizer(rule, [weight], horizon=3)
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="needs the loss"):
        optimizer.step()
    state = rule.init({"w": weight}, infer_info({"w": weight}))
    with pytest.raises(ValueError, match="loss"):
        rule.update({"w": weight}, state, {"w": weight}, rule.hp, Context(infer_info({"w": weight}), horizon=3))


def test_meta_trained_controller_raises_a_rate_that_is_far_too_low() -> None:
    """Gradient descent on a parabola from lr 1e-3, 30 steps: a policy that raises lr by 0.1 per step reaches 20 times it."""
    learned = Controller(rule="sgd", hidden=4)
    theta = {key: v.requires_grad_() for key, v in learned.init_theta(torch.Generator().manual_seed(0)).items()}
    policy = [value for key, value in theta.items() if key.startswith("policy.")]
    outer = torch.optim.Adam(policy, lr=0.03)

    def loss_after(steps: int) -> Tensor:
        params = {"x": torch.tensor([1.0, -2.0])}
        info = infer_info(params)
        state = learned.init(params, info, theta)
        for t in range(steps):
            ctx = Context(info, step=torch.tensor(t), loss=params["x"].square().sum(), horizon=steps)
            params, state = learned.update(theta, {"x": 2 * params["x"]}, state, params, learned.hp, ctx)
        return params["x"].square().sum()

    before = loss_after(30).item()
    for _ in range(25):
        outer.zero_grad()
        loss_after(30).backward()
        outer.step()
    assert loss_after(30).item() < 0.6 * before
