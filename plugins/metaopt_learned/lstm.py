"""Coordinate-wise recurrent networks, and the learned optimizer that is nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import random_layers, run_layers
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, compute_dtype, hp_of
from metaopt.space import hyper, option

LAYERS = 2


class CoordinateLSTM(LearnedRule):
    r"""A small LSTM, the same for every parameter, that maps its gradient to its step.

    .. math:: p \leftarrow p + 0.1\, \eta\, y, \qquad (y, h, c) = \mathrm{LSTM}(\phi(g), h, c)

    with two layers of H units, a linear output y, and per coordinate its own hidden and cell states h and c. The gradient
    is seen by sign and magnitude:

    .. math:: \phi(g) = (\log|g| / k,\ \mathrm{sgn}\, g) \text{ where } |g| \ge e^{-k}, \text{ else } (-1,\ e^k g)

    with k = 10. Andrychowicz et al., 2016, section 2.1 and appendix A (https://arxiv.org/abs/1606.04474).
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned step")
    hidden: int = option(20, low=1, doc="units H of each layer")
    step_scale: float = option(0.1, doc="constant of the step")

    def init_theta(self, generator: Generator) -> Theta:
        """`init_lstm`, and an output layer of variance 1 / H."""
        (output,) = random_layers((self.hidden, 1), generator)
        return init_lstm(2, self.hidden, generator) | {"output.w": output[0], "output.b": output[1]}

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """``hidden`` and ``cell`` [2, H, *shape], zero; float32 or better."""
        return {name: recurrent_state(param, self.hidden) for name, param in params.items()}

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        new_params: Params = {}
        new_state: State = {}
        for name, param in params.items():
            dtype = compute_dtype(param.dtype)
            weights = {key: value.to(dtype) for key, value in theta.items()}
            output, slots = lstm(weights, gradient_features(grads[name].to(dtype)), state[name])
            moved = run_layers(((theta["output.w"], theta["output.b"]),), output)[0]
            new_params[name] = (param.to(dtype) + self.step_scale * hp_of(hp, name)["lr"] * moved).to(param.dtype)
            new_state[name] = {"step": state[name]["step"] + 1, **slots}
        return new_params, new_state


def gradient_features(grad: Tensor, k: float = 10.0) -> Tensor:
    """phi of `CoordinateLSTM` [2, *shape]: (log|g| / k, sgn g), or (-1, e^k g) where |g| < e^-k."""
    size = grad.abs().clamp(min=math.exp(-k))  # a zero gradient has a finite logarithm, and derivative
    return torch.stack([size.log() / k, (math.exp(k) * grad).clamp(-1.0, 1.0)])


def init_lstm(inputs: int, hidden: int, generator: Generator) -> Theta:
    """Weights of `lstm`: uniform in +-1 / sqrt(H); forget gates start open (bias 1), the other biases at 0. float32, CPU.

    Per layer l: ``lstm{l}.input`` [inputs, 4 H], ``lstm{l}.hidden`` [H, 4 H] and ``lstm{l}.b`` [4 H].
    """
    theta: Theta = {}
    bound = 1 / math.sqrt(hidden)
    for layer in range(LAYERS):
        for kind, rows in (("input", hidden if layer else inputs), ("hidden", hidden)):
            theta[f"lstm{layer}.{kind}"] = bound * (2 * torch.rand(rows, 4 * hidden, generator=generator) - 1)
        theta[f"lstm{layer}.b"] = torch.cat([torch.zeros(hidden), torch.ones(hidden), torch.zeros(2 * hidden)])
    return theta


def recurrent_state(param: Tensor, hidden: int) -> dict[str, Tensor]:
    """``step``, and zero ``hidden`` and ``cell`` [2, H, *shape] for `lstm`; float32 or better."""
    zeros = param.new_zeros((LAYERS, hidden, *param.shape), dtype=compute_dtype(param.dtype))
    return {"step": param.new_zeros((), dtype=torch.int64), "hidden": zeros, "cell": zeros.clone()}


def lstm(theta: Theta, inputs: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    r"""One step of a two-layer LSTM that all coordinates share.

    .. math:: (i, f, z, o) = W x + U h + b, \quad c \leftarrow \sigma(f)\, c + \sigma(i) \tanh z,
        \quad h \leftarrow \sigma(o) \tanh c

    Args:
        theta: from `init_lstm`.
        inputs: [inputs, *shape].
        state: ``hidden`` and ``cell`` [2, H, *shape].

    Returns:
        The upper layer's h [H, *shape], and the new ``hidden`` and ``cell``.
    """
    shape = inputs.shape[1:]
    x = inputs.reshape(len(inputs), -1)
    hidden, cell = [], []
    for layer in range(LAYERS):
        h, c = (state[slot][layer].reshape(len(state[slot][layer]), -1) for slot in ("hidden", "cell"))
        gates = theta[f"lstm{layer}.input"].mT @ x + theta[f"lstm{layer}.hidden"].mT @ h
        i, f, z, o = (gates + theta[f"lstm{layer}.b"].unsqueeze(-1)).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        x = torch.sigmoid(o) * torch.tanh(c)
        hidden.append(x)
        cell.append(c)
    planes = (LAYERS, len(x), *shape)
    new = {"hidden": torch.stack(hidden).reshape(planes), "cell": torch.stack(cell).reshape(planes)}
    return new["hidden"][-1], new
