"""The factored-accumulator MLP optimizer (small_fc_lopt, AdafacMLPLOpt)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Generator, Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, hp_of
from metaopt.space import hyper, option

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAYS = (0.999,)
FACTORED_DECAYS = (0.9, 0.99, 0.999)
TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
PARAMETER_FEATURES = 28
FEATURES = PARAMETER_FEATURES + len(TIME_SCALES)


class AdafacMLP(LearnedRule):
    r"""A small MLP that maps 39 features of each parameter to its step.

    Accumulators, without bias correction, with learned decays: three momenta :math:`m_k`, one second moment v, and
    three factored second moments (row means R_k, column means C_k; vectors keep the whole V_k). Features, in order:
    g, p, m_k, v, m_k r, r, factored g, R_k, C_k, R_k^{-1/2}, C_k^{-1/2}, factored m_k with :math:`r = (v+10^{-6})^{-1/2}`;
    each divided by its RMS over the tensor; then :math:`\tanh(t/\tau_j - 1)` for eleven time scales, t = 0 first.

    .. math:: p \leftarrow p - \eta\, c\, d\, e^{0.001 s}, \qquad (d, s) = \mathrm{MLP}_{39 \to H \to H \to 2}(features)

    Metz et al., 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers"
    (https://arxiv.org/abs/2203.11860). ``step_scale`` c is 0.001 in learned_optimization and 0.01 in muLO and PyLO.
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned step")
    hidden: int = option(4, low=1, doc="width H of both hidden layers")
    step_scale: float = option(0.001, doc="constant c of the step")
    magnitude_scale: float = option(0.001, doc="constant in the exponent")
    layout: str = option(
        "torch", choices=("torch", "jax"), doc="which axis is the output one where sizes tie: the first, or the last"
    )

    def init_theta(self, generator: Generator) -> Theta:
        """Truncated normal weights of variance 1 / fan-in, zero biases and zero decay offsets."""
        sizes = (FEATURES, self.hidden, self.hidden, 2)
        theta: Theta = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            weight = torch.empty(fan_in, fan_out)
            torch.nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0, generator=generator)
            # a normal cut at two standard deviations has a deviation of 0.8796
            theta[f"w{i}"] = weight / (0.87962566103423978 * math.sqrt(fan_in))
            theta[f"b{i}"] = torch.zeros(fan_out)
        theta["momentum_decays"] = torch.zeros(len(MOMENTUM_DECAYS))
        theta["rms_decays"] = torch.zeros(len(RMS_DECAYS))
        theta["adafactor_decays"] = torch.zeros(len(FACTORED_DECAYS))
        return theta

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """``momentum`` [3, *shape], ``rms`` [1, *shape], and ``row``, ``col`` or ``diag`` [3, ...]; float32 or better."""
        state: State = {}
        for name, param in params.items():
            zeros = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
            slots = {"momentum": zeros.expand(3, *param.shape).clone(), "rms": zeros.expand(1, *param.shape).clone()}
            axes = factored_axes(tuple(param.shape), self.layout)
            if axes is None:
                slots["diag"] = zeros.expand(3, *param.shape).clone()
            else:
                for slot, axis in zip(("row", "col"), (axes[1], axes[0]), strict=True):
                    slots[slot] = zeros.sum(axis).expand(3, *zeros.sum(axis).shape).clone()
            step = torch.zeros((), dtype=torch.int64, device=param.device)
            state[name] = {"step": step, **slots}
        return state

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        new_params: Params = {}
        new_state: State = {}
        for name, param in params.items():
            slots, step = state[name], state[name]["step"]
            dtype = slots["momentum"].dtype
            weights = {key: value.to(dtype) for key, value in theta.items()}
            axes = factored_axes(tuple(param.shape), self.layout)
            slots, factored = _accumulate(weights, grads[name].to(dtype), slots, axes)
            t = (step if ctx.step is None else ctx.step).to(dtype)
            moved = self._step(weights, param.to(dtype), grads[name].to(dtype), slots, factored, axes, t)
            new_params[name] = (param.to(dtype) - hp_of(hp, name)["lr"] * moved).to(param.dtype)
            new_state[name] = {"step": step + 1, **slots}
        return new_params, new_state

    def _step(
        self,
        theta: Theta,
        param: Tensor,
        grad: Tensor,
        slots: dict[str, Tensor],
        factored: Tensor,
        axes: tuple[int, int] | None,
        t: Tensor,
    ) -> Tensor:
        inputs = features(param, grad, slots, factored, axes)
        flat = inputs.reshape(PARAMETER_FEATURES, -1)
        flat = flat * torch.rsqrt(1e-5 + (flat * flat).mean(1, keepdim=True))
        # the time features are the same for every parameter, so they are part of the first bias
        scales = torch.tensor(TIME_SCALES, dtype=t.dtype, device=t.device)
        bias = theta["b0"] + torch.tanh(t / scales - 1) @ theta["w0"][PARAMETER_FEATURES:]
        hidden = torch.relu(theta["w0"][:PARAMETER_FEATURES].mT @ flat + bias.unsqueeze(-1))
        hidden = torch.relu(theta["w1"].mT @ hidden + theta["b1"].unsqueeze(-1))
        direction, magnitude = (theta["w2"].mT @ hidden + theta["b2"].unsqueeze(-1)).unbind(0)
        return (direction * torch.exp(self.magnitude_scale * magnitude) * self.step_scale).reshape(param.shape)


def factored_axes(shape: tuple[int, ...], layout: str) -> tuple[int, int] | None:
    """(d1, d0): the second largest and the largest axis; None for scalars and vectors.

    Ties go by position: later counts as larger, in the order [..., in, out] of the JAX originals; torch's
    (out, in, *kernel) is read as (*kernel, in, out).
    """
    if len(shape) < 2:
        return None
    order = range(len(shape)) if layout == "jax" else (*range(2, len(shape)), 1, 0)
    *_, d1, d0 = sorted(order, key=lambda axis: shape[axis])
    return d1, d0


def decays(theta: Theta, name: str, initial: tuple[float, ...]) -> Tensor:
    """1 - (1 - initial) exp(10 theta), clipped to [0, 1]."""
    offset = theta[name]
    complement = torch.tensor([1.0 - d for d in initial], dtype=offset.dtype, device=offset.device)
    return (1 - complement * torch.exp(10 * offset)).clamp(0, 1)


def _blend(old: Tensor, new: Tensor, decay: Tensor) -> Tensor:
    """decay old + (1 - decay) new, one decay per leading plane of ``old``."""
    decay = decay.reshape(-1, *(1,) * (old.dim() - 1))
    return decay * old + (1 - decay) * new


def _accumulate(
    theta: Theta, grad: Tensor, slots: dict[str, Tensor], axes: tuple[int, int] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """New accumulators, and the factors [3, *shape] that turn g into its factored form."""
    square = grad * grad
    new = {
        "momentum": _blend(slots["momentum"], grad, decays(theta, "momentum_decays", MOMENTUM_DECAYS)),
        "rms": _blend(slots["rms"], square, decays(theta, "rms_decays", RMS_DECAYS)),
    }
    decay = decays(theta, "adafactor_decays", FACTORED_DECAYS)
    if axes is None:
        new["diag"] = _blend(slots["diag"], square + 1e-30, decay)
        return new, torch.rsqrt(torch.clamp(new["diag"] + 1e-9, min=1e-9))
    d1, d0 = axes
    new["row"] = _blend(slots["row"], (square + 1e-30).mean(d0), decay)
    new["col"] = _blend(slots["col"], (square + 1e-30).mean(d1), decay)
    within_row = d1 - (d1 > d0) + 1  # where d1 is in ``row`` [3, shape without d0]
    relative = new["row"] / (new["row"].mean(within_row, keepdim=True) + 1e-9)
    row_factor = torch.rsqrt(torch.clamp(relative, min=1e-9)).unsqueeze(d0 + 1)
    col_factor = torch.rsqrt(torch.clamp(new["col"], min=1e-9)).unsqueeze(d1 + 1)
    return new, row_factor * col_factor


def features(
    param: Tensor, grad: Tensor, slots: dict[str, Tensor], factored: Tensor, axes: tuple[int, int] | None
) -> Tensor:
    """The 28 features of each parameter, [28, *shape], before normalisation."""
    m, v = slots["momentum"], slots["rms"]
    r = torch.rsqrt(v + 1e-6)
    if axes is None:
        row = col = slots["diag"]
        factored_m = m * (slots["diag"] + 1e-6) ** -0.5
    else:
        row, col = slots["row"].unsqueeze(axes[1] + 1), slots["col"].unsqueeze(axes[0] + 1)
        factored_m = m * factored
    shape = m.shape
    parts = [
        grad.unsqueeze(0), param.unsqueeze(0), m, v, m * r, r, grad * factored, row.expand(shape), col.expand(shape),
        torch.rsqrt(row + 1e-8).expand(shape), torch.rsqrt(col + 1e-8).expand(shape), factored_m,
    ]  # fmt: skip
    return torch.cat(parts)
