"""The recurrent learned optimizers against torch's own LSTM and a restatement in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learned_cases import noisy_theta, values
from torch import Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, Params, infer_info
from metaopt_learned.lstm import CoordinateLSTM, gradient_features
from metaopt_learned.structured import StructuredL2O

SHAPES = {"w": (3, 4), "b": (4,), "s": ()}
STEPS, LR = 5, 0.5


def trajectory(learned: LearnedRule, theta: Theta, params: Params) -> list[Params]:
    info, found = infer_info(params), []
    state = learned.init(params, info, theta)
    for t in range(STEPS):
        params, state = learned.update(theta, values(100 + t, SHAPES), state, params, {"lr": LR}, Context(info))
        found.append(params)
    return found


def torch_lstm(theta: Theta, hidden: int) -> torch.nn.LSTM:
    """torch's two-layer LSTM with the same numbers; its second bias is 0."""
    made = torch.nn.LSTM(2, hidden, num_layers=2).double()
    with torch.no_grad():
        for layer in (0, 1):
            getattr(made, f"weight_ih_l{layer}").copy_(theta[f"lstm{layer}.input"].mT)
            getattr(made, f"weight_hh_l{layer}").copy_(theta[f"lstm{layer}.hidden"].mT)
            getattr(made, f"bias_ih_l{layer}").copy_(theta[f"lstm{layer}.b"])
            getattr(made, f"bias_hh_l{layer}").zero_()
    return made


def outputs(theta: Theta, hidden: int, inputs: list[np.ndarray]) -> np.ndarray:
    """Upper hidden states [T, coordinates, H] for inputs of [2, coordinates] at each step."""
    sequence = torch.from_numpy(np.stack([x.T for x in inputs]))
    with torch.no_grad():
        return torch_lstm(theta, hidden)(sequence)[0].numpy()


def phi(grad: np.ndarray) -> np.ndarray:
    """Appendix A of the paper, case by case."""
    found = np.empty((2, grad.size))
    for i, g in enumerate(grad.reshape(-1)):
        large = abs(g) >= np.exp(-10)
        found[:, i] = (np.log(abs(g)) / 10, np.sign(g)) if large else (-1, np.exp(10) * g)
    return found


def test_gradient_features_are_those_of_the_paper_and_have_derivatives_at_zero() -> None:
    grad = torch.tensor([3.0, -1e-3, 4.5e-5, 1e-6, -1e-9, 0.0, 1e8], dtype=torch.float64, requires_grad=True)
    found = gradient_features(grad)
    np.testing.assert_allclose(found.detach().numpy(), phi(grad.detach().numpy()), rtol=1e-13, atol=1e-15)
    found.sum().backward()
    assert grad.grad is not None and grad.grad.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_coordinate_lstm_is_torchs_lstm_on_every_coordinate(name: str) -> None:
    learned = CoordinateLSTM(hidden=6)
    theta = noisy_theta(learned, 0.1)
    found = trajectory(learned, theta, values(1, SHAPES))
    grads = [values(100 + t, SHAPES)[name].numpy() for t in range(STEPS)]
    upper = outputs(theta, 6, [phi(g) for g in grads])
    moves = upper @ theta["output.w"].numpy()[:, 0] + theta["output.b"].item()
    p = values(1, SHAPES)[name].numpy().reshape(-1)
    for t in range(STEPS):
        p = p + 0.1 * LR * moves[t]
        np.testing.assert_allclose(found[t][name].numpy().reshape(-1), p, rtol=1e-11, atol=1e-12)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("terms", ["p", "a", "pa", "pab", "b"])
def test_structured_update_is_the_papers(name: str, terms: str) -> None:
    learned = StructuredL2O(hidden=6, preconditioned="p" in terms, accelerated="a" in terms, biased="b" in terms)
    theta = noisy_theta(learned, 0.1)
    found = trajectory(learned, theta, values(1, SHAPES))
    numbers = {key: value.numpy() for key, value in theta.items()}
    y = x = values(1, SHAPES)[name].numpy().reshape(-1)
    inputs: list[np.ndarray] = []
    for t in range(STEPS):
        grad = values(100 + t, SHAPES)[name].numpy().reshape(-1)
        inputs.append(np.stack([grad, y]))
        upper = outputs(theta, 6, inputs)[t]
        layer = np.maximum(upper @ numbers["layer.w"] + numbers["layer.b"], 0)
        heads = list((layer @ numbers["heads.w"] + numbers["heads.b"]).T)
        p = 2 * sigmoid(heads.pop(0)) if "p" in terms else 1.0
        a = 2 * sigmoid(heads.pop(0)) if "a" in terms else 0.0
        b1, b2 = heads if "b" in terms else (0.0, 0.0)
        new_x = y - LR * np.exp(numbers["log_step"]) * p * grad + b1
        y = new_x + a * (new_x - x) + b2
        x = new_x
        np.testing.assert_allclose(found[t][name].numpy().reshape(-1), y, rtol=1e-11, atol=1e-12)


def test_fresh_structured_rule_is_nesterovs_method() -> None:
    """x+ = y - 0.01 g(y), y+ = x+ + 0.9 (x+ - x)."""
    learned = StructuredL2O()
    theta = {key: value.double() for key, value in learned.init_theta(torch.Generator().manual_seed(0)).items()}
    found = trajectory(learned, theta, values(1, SHAPES))
    y = x = values(1, SHAPES)["w"]
    for t in range(STEPS):
        new_x = y - 0.01 * LR * values(100 + t, SHAPES)["w"]
        y, x = new_x + 0.9 * (new_x - x), new_x
        torch.testing.assert_close(found[t]["w"], y, rtol=1e-6, atol=1e-8)  # theta's 0.01 and 0.9 are float32


def test_a_coordinate_sees_no_other() -> None:
    """Both rules: what moves one entry depends on its own gradients only."""
    for learned in (CoordinateLSTM(), StructuredL2O()):
        theta = noisy_theta(learned, 0.1)
        params = {"w": values(1, SHAPES)["w"]}
        info = infer_info(params)
        state = learned.init(params, info, theta)

        def step(
            grad: Tensor,
            learned: LearnedRule = learned,
            theta: Theta = theta,
            params: Params = params,
            s: object = state,
        ) -> Tensor:
            ctx = Context(infer_info(params))
            return learned.update(theta, {"w": grad}, s, params, {"lr": LR}, ctx)[0]["w"]  # type: ignore[arg-type]

        jacobian = torch.autograd.functional.jacobian(step, values(100, SHAPES)["w"]).reshape(12, 12)
        assert (jacobian.diagonal() != 0).all() and torch.equal(jacobian, jacobian.diagonal().diag())
