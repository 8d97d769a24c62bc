"""NNAdam: an LSTM for each tensor moves the hyperparameters of the tensor's Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, compute_dtype, hp_of
from metaopt.space import hyper, option
from metaopt_learned.recurrent import (
    clipped_log,
    for_params,
    init_lstm,
    linear,
    linears_from_original,
    lstm,
    lstm_from_original,
    moments,
    own,
    rows,
    start_rows,
    unrows,
)

TENSOR_FEATURES = 19
_BOUNDS = tuple(math.log(bound) / 10 for bound in (1e-8, 1e3, 1e-11, 1e4))
"""Of the controls of lr and eps."""


class NNAdam(LearnedRule):
    r"""Adam with a learning rate, decays and epsilon of its own for each tensor, which an LSTM moves at every step.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \eta\, lr\, (1 + \epsilon) \frac{m}{\epsilon + \sqrt{v + 10^{-10}}}

    without bias correction, of gradients clipped to 1000. The controls are x = log(lr) / 10, log(1 - beta_1) / 10,
    log(1 - beta_2) / 10 and log(epsilon) / 10; they start as learned numbers x_0, and after the step become
    :math:`x + a - \rho (x + a - x_0)` within their bounds (lr in [1e-8, 1e3], 1 - beta in [e^-10, 1], epsilon in [1e-11, 1e4]),
    a being ``output_scale`` times a linear map of the LSTM's output. The LSTM sees the controls, mean and variance of m, v, p
    and g, mean |g|, and whether the tensor is a scalar or a vector. NNAdam in learned_optimization.

    State per parameter besides ``step``: ``momentum``, ``rms``, the LSTM's row and ``controls`` [4].
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned learning rates")
    lstm_hidden: int = option(32, low=1, doc="units of the LSTM")
    output_scale: float = option(0.01, doc="how fast the controls move")
    decay_strength: float = option(0.0, doc="rho: how strongly the controls are drawn to where they started")
    initial_lr: float = option(1e-4, doc="of fresh meta-parameters")

    def init_theta(self, generator: Generator) -> Theta:
        """The controls of Adam with ``initial_lr``; a truncated normal LSTM whose output moves nothing yet."""
        theta: Theta = {}
        init_lstm(theta, TENSOR_FEATURES, self.lstm_hidden, generator)
        theta["lstm.control_w"], theta["lstm.control_b"] = torch.zeros(self.lstm_hidden, 4), torch.zeros(4)
        theta["controls"] = torch.tensor([self.initial_lr, 1 - 0.9, 1 - 0.999, 1e-8]).log() / 10
        return theta

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """See the class; float32 or better."""
        state = start_rows(theta, params)
        for name, param in params.items():
            state[name] |= {
                "step": torch.zeros((), dtype=torch.int64, device=param.device),
                **{slot: torch.zeros_like(param, dtype=compute_dtype(param.dtype)) for slot in ("momentum", "rms")},
                "controls": own(theta["controls"], param),
            }
        return state

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        theta = for_params(theta, params)
        controls = rows(state, params, "controls")
        lr, beta1, beta2, eps = _hyperparameters(controls)
        new_params: Params = {}
        new_state: State = {}
        found, kinds = [], []
        for i, (name, param) in enumerate(params.items()):
            p = param.to(compute_dtype(param.dtype))
            g = grads[name].to(p.dtype).clamp(-1000, 1000)
            rate, b1, b2, e = (value[i].to(p.dtype) for value in (lr, beta1, beta2, eps))
            m = b1 * state[name]["momentum"] + (1 - b1) * g
            v = b2 * state[name]["rms"] + (1 - b2) * g.square()
            step = rate * (1 + e) * m / (e + torch.sqrt(v + 1e-10))
            new_params[name] = (p - hp_of(hp, name)["lr"] * step).to(param.dtype)
            new_state[name] = {"step": state[name]["step"] + 1, "momentum": m, "rms": v}
            found.append(torch.cat(moments([value.unsqueeze(0) for value in (g.abs(), g, m, p, v)]), 1).reshape(-1))
            kinds.append([1.0 if param.dim() == rank else -1.0 for rank in (1, 0)])
        statistics = torch.stack(found).to(controls.dtype), controls.new_tensor(kinds)
        row = rows(state, params, "hidden"), rows(state, params, "cell")
        hidden, cell = lstm(theta, _tensor_features(controls, *statistics), *row)
        moved = controls + self.output_scale * linear(theta, "lstm.control", hidden)
        moved = _bounded(moved - self.decay_strength * (moved - theta["controls"]))
        memory = unrows(params, {"hidden": hidden, "cell": cell, "controls": moved})
        return new_params, {name: new_state[name] | memory[name] for name in params}

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of learned_optimization."""
        head = linears_from_original(arrays, {"lstm.control": "rnn_to_controls_params/rnn_to_controls"})
        names = ("per_layer_lr", "per_layer_beta1", "per_layer_beta2", "per_layer_epsilon")
        return lstm_from_original(arrays) | head | {"controls": torch.stack([arrays[name] for name in names])}


def _bounded(controls: Tensor) -> Tensor:
    """The controls [T, 4] within their bounds."""
    lr, beta1, beta2, eps = controls.unbind(1)
    betas = (beta1.clamp(-1, 0), beta2.clamp(-1, 0))
    return torch.stack([lr.clamp(*_BOUNDS[:2]), *betas, eps.clamp(*_BOUNDS[2:])], 1)


def _hyperparameters(controls: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lr, beta1, beta2 and epsilon, [T] each, from the controls [T, 4]."""
    lr, beta1, beta2, eps = torch.exp(10 * _bounded(controls)).unbind(1)
    return lr, 1 - beta1, 1 - beta2, eps


def _tensor_features(controls: Tensor, statistics: Tensor, kinds: Tensor) -> Tensor:
    """What the LSTM sees, [T, 19]."""
    lr, beta1, beta2, eps = (0.2 * controls.clamp(-5, 5)).split(1, 1)
    size_g, _, mean_g, var_g, mean_m, var_m, mean_p, var_p, mean_v, var_v = statistics.split(1, 1)

    def seen(mean: Tensor) -> list[Tensor]:
        return [0.5 * clipped_log(mean), torch.sign(mean)]

    spreads = [0.5 * clipped_log(value) for value in (var_g, var_m, var_p, var_v)]
    means = [*seen(mean_g), 0.5 * clipped_log(size_g), *seen(mean_m), *seen(mean_p), *seen(mean_v)]
    return torch.cat([beta1, beta2, eps, kinds, lr, *means, *spreads], 1)
