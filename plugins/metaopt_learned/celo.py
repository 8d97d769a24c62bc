"""Celo and Celo-Adam: a learned schedule, by an LSTM that sees the loss, over a fixed kind of step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import Prepared, random_layers
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, compute_dtype, hp_of
from metaopt.space import hyper, option
from metaopt_learned.feature_sets import constant_decays
from metaopt_learned.recurrent import (
    PROGRESS_FEATURES,
    for_params,
    init_linear,
    init_mixing_lstm,
    linear,
    mean_squares,
    mixing_lstm,
    mixing_lstm_from_original,
    progress_features,
    rows,
    start_progress,
    unrows,
)
from metaopt_learned.velo import TensorScaledRule, networks_from_original


class Celo(TensorScaledRule):
    r"""One small network for all parameters, and an LSTM that schedules the size of its steps.

    The network is a part of theta; :math:`\lambda = 0.1 e^{y}` with y a linear head of an LSTM that sees `progress_features`.
    The step is that of `TensorScaledRule`. Meta-training has two phases: in phase 1 the network learns with
    :math:`\lambda = 1`; in phase 2 the LSTM learns, with the network (``mlp.*``) frozen.

    Moudgil et al., 2025, "Celo: Training versatile learned optimizers on a compute diet"
    (https://arxiv.org/abs/2501.12670).
    """

    lstm_hidden: int = option(64, low=1, doc="units of the LSTM")
    phase: int = option(2, choices=(1, 2), doc="1: without the LSTM, to train mlp.*; 2: with it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for need in ("needs_loss", "needs_horizon"):
            object.__setattr__(self, need, self.phase == 2)

    def init_theta(self, generator: Generator) -> Theta:
        """Truncated normal weights of variance 1 / fan-in; biases and the LSTM's first row zero."""
        theta: Theta = {}
        for i, (weight, bias) in enumerate(random_layers(self.layer_sizes, generator)):
            theta[f"mlp.w{i}"], theta[f"mlp.b{i}"] = weight, bias
        init_scheduler(theta, self.lstm_hidden, generator)
        return theta

    def init_memory(self, theta: Theta, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """`start_progress`; nothing in phase 1."""
        return super().init_memory(theta, params, info) if self.phase == 1 else start_progress(theta, params)

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """The network as it is; the schedule in ``scale``."""
        theta = for_params(theta, params)
        like = theta["lstm.hidden"]
        network = tuple((theta[f"mlp.w{i}"], theta[f"mlp.b{i}"]) for i in range(len(self.layer_sizes) - 1))
        squares = mean_squares(tuple(params.values()))
        multiplier = torch.ones_like(squares)
        memory: State = {}
        if self.phase == 2:
            multiplier, memory = schedule(theta, state, params, ctx)
        scale = self.scales(params, squares, multiplier, hp)
        keep = dict.fromkeys(params, torch.ones_like(like[0]))
        return Prepared(constant_decays(like), dict.fromkeys(params, network), scale, keep, memory)

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of celo, which has the network, as a bank of one, and a head to mix it, unused."""
        networks = {name: value.squeeze(0) for name, value in networks_from_original(arrays).items()}
        return networks | mixing_lstm_from_original(arrays)


class CeloAdam(LearnedRule):
    r"""Adam whose learning rate is scheduled by an LSTM.

    .. math:: p \leftarrow p - 10^{-4}\, \eta\, e^{y} \frac{\hat m}{10^{-8} + \sqrt{\hat v + 10^{-10}}}

    with :math:`\hat m, \hat v` Adam's, with decays .9 and .999 and bias correction, of gradients clipped to 1000, and y a
    linear head of an LSTM that sees `progress_features`. Moudgil et al., 2025 (https://arxiv.org/abs/2501.12670).
    """

    needs_loss = True
    needs_horizon = True

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned step; weights are for 1")
    lstm_hidden: int = option(64, low=1, doc="units of the LSTM")

    def init_theta(self, generator: Generator) -> Theta:
        """`init_scheduler`."""
        theta: Theta = {}
        init_scheduler(theta, self.lstm_hidden, generator)
        return theta

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """``momentum`` and ``rms`` like the parameter, and `start_progress`; float32 or better."""
        memory = start_progress(theta, params)
        return {
            name: {
                "step": torch.zeros((), dtype=torch.int64, device=param.device),
                **{slot: torch.zeros_like(param, dtype=compute_dtype(param.dtype)) for slot in ("momentum", "rms")},
                **memory[name],
            }
            for name, param in params.items()
        }

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        multiplier, memory = schedule(for_params(theta, params), state, params, ctx)
        new_params, new_state = {}, {}
        for (name, param), lr in zip(params.items(), multiplier.unbind(0), strict=True):
            wide = param.to(compute_dtype(param.dtype))
            grad = grads[name].to(wide.dtype).clamp(-1000, 1000)
            m = 0.9 * state[name]["momentum"] + (1 - 0.9) * grad
            v = 0.999 * state[name]["rms"] + (1 - 0.999) * grad.square()
            t = (ctx.updates_of(state[name]) + 1).to(torch.float64)
            m_weight, v_weight = ((1 - decay**t).to(wide.dtype) for decay in (0.9, 0.999))
            step = m / m_weight / (1e-8 + torch.sqrt(v / v_weight + 1e-10))
            new_params[name] = (wide - 0.001 * hp_of(hp, name)["lr"] * lr.to(wide.dtype) * step).to(param.dtype)
            new_state[name] = {"step": state[name]["step"] + 1, "momentum": m, "rms": v, **memory[name]}
        return new_params, new_state

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of celo."""
        return mixing_lstm_from_original(arrays)


def init_scheduler(theta: Theta, hidden: int, generator: Generator) -> None:
    """Add the weights of `schedule`."""
    init_mixing_lstm(theta, PROGRESS_FEATURES, hidden, generator)
    init_linear(theta, "lstm.step", hidden, 1, generator)


def schedule(theta: Theta, state: State, params: Params, ctx: Context) -> tuple[Tensor, State]:
    """0.1 exp(y) [T] from the LSTM, and its memory after this step."""
    progress, memory = progress_features(state, params, ctx, theta["lstm.hidden"])
    hidden, cell = mixing_lstm(theta, progress, rows(state, params, "hidden"), rows(state, params, "cell"))
    multiplier = 0.1 * torch.exp(linear(theta, "lstm.step", hidden).squeeze(1))
    return multiplier, unrows(params, memory | {"hidden": hidden, "cell": cell})
