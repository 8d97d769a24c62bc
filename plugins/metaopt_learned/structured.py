"""The learned optimizer whose form is derived from what convergent methods have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator

from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import random_layers, run_layers
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, compute_dtype, hp_of
from metaopt.space import hyper, option
from metaopt_learned.lstm import init_lstm, lstm, recurrent_state


class StructuredL2O(LearnedRule):
    r"""Math-structured learning to optimize (L2O-PA): preconditioned gradient, accelerated term, optional biases.

    .. math::
        x_{k+1} &= y_k - \eta\, \alpha\, p_k \odot \nabla f(y_k) + b_{1,k} \\
        y_{k+1} &= x_{k+1} + a_k \odot (x_{k+1} - x_k) + b_{2,k} \\
        p_k &= 2 \sigma(P o_k), \quad a_k = 2 \sigma(A o_k), \quad (b_{1,k}, b_{2,k}) = B o_k, \quad
            o_k = \mathrm{relu}(W\, \mathrm{LSTM}(\nabla f(y_k), y_k))

    coordinate by coordinate. The parameters are y, where gradients are taken; state keeps x (``iterate``). Liu, Chen, Wang,
    Yin and Cai, 2023, equations 18 and 19 (https://arxiv.org/abs/2305.18577), for an f without nonsmooth part (its proximal
    operator is the identity) and B_k = I (no second gradient, at x). Differences: the paper knows the step 1 / L and
    random initial h and c; here alpha is a meta-parameter and the states start at 0. Theta starts at
    p = 1, a = 0.9 and b = 0: Nesterov's method.
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the preconditioned gradient")
    hidden: int = option(20, low=1, doc="units of each LSTM layer")
    preconditioned: bool = option(True, choices=(False, True), doc="learn p (else 1)")
    accelerated: bool = option(True, choices=(False, True), doc="learn a (else 0)")
    biased: bool = option(False, choices=(False, True), doc="learn b1 and b2 (else 0)")

    @property
    def _heads(self) -> tuple[str, ...]:
        """Which of the terms are learned, in the order of the network's outputs."""
        return ("p",) * self.preconditioned + ("a",) * self.accelerated + ("b1", "b2") * self.biased

    def init_theta(self, generator: Generator) -> Theta:
        """`init_lstm`, a layer of variance 1 / H, zero heads (see the class) and alpha = 0.01."""
        ((weight, bias),) = random_layers((self.hidden, self.hidden), generator)
        theta = init_lstm(2, self.hidden, generator) | {"layer.w": weight, "layer.b": bias}
        starts = {"p": 0.0, "a": math.log(0.45 / 0.55), "b1": 0.0, "b2": 0.0}
        theta["heads.w"] = torch.zeros(self.hidden, len(self._heads))
        theta["heads.b"] = torch.tensor([starts[head] for head in self._heads])
        theta["log_step"] = torch.tensor(math.log(0.01))
        return theta

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """``iterate``: x, a copy of the parameter; ``hidden`` and ``cell`` [2, H, *shape], zero; float32 or better."""
        return {
            name: {
                **recurrent_state(param, self.hidden),
                "iterate": param.to(compute_dtype(param.dtype), copy=True),
            }
            for name, param in params.items()
        }

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        new_params: Params = {}
        new_state: State = {}
        for name, param in params.items():
            dtype = compute_dtype(param.dtype)
            weights = {key: value.to(dtype) for key, value in theta.items()}
            y, grad, x = param.to(dtype), grads[name].to(dtype), state[name]["iterate"]
            output, slots = lstm(weights, torch.stack([grad, y]), state[name])
            layers = tuple((theta[f"{kind}.w"], theta[f"{kind}.b"]) for kind in ("layer", "heads"))
            term = dict(zip(self._heads, run_layers(layers, output).unbind(0), strict=True))
            moved = torch.exp(weights["log_step"]) * hp_of(hp, name)["lr"] * grad
            new_x = y - (2 * torch.sigmoid(term["p"]) * moved if self.preconditioned else moved)
            new_x = new_x + term["b1"] if self.biased else new_x
            new_y = new_x + 2 * torch.sigmoid(term["a"]) * (new_x - x) if self.accelerated else new_x
            new_y = new_y + term["b2"] if self.biased else new_y
            new_params[name] = new_y.to(param.dtype)
            new_state[name] = {"step": state[name]["step"] + 1, "iterate": new_x.to(dtype), **slots}
        return new_params, new_state
