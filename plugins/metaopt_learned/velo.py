"""VeLO: an LSTM for each tensor writes the network that steps the tensor's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.perparameter import Features, PerParameterRule, Prepared, random_layers
from metaopt.rule import Context, HyperValues, ParamInfo, Params, PerParameter, State
from metaopt.space import hyper, option
from metaopt_learned.feature_sets import FACTORED_DECAYS, MOMENTUM_DECAYS, RMS_DECAYS, VELO_BLOCKS, constant_decays
from metaopt_learned.recurrent import (
    PROGRESS,
    PROGRESS_FEATURES,
    clipped_log,
    for_params,
    init_linear,
    init_mixing_lstm,
    linear,
    linears_from_original,
    mean_squares,
    mixing_lstm,
    mixing_lstm_from_original,
    moments,
    progress_features,
    rows,
    start_progress,
    unrows,
)

PARAMETER_FEATURES, OUTPUTS = 30, 3
RANKS = 5
STEP_SCALE = 0.001


class TensorScaledRule(PerParameterRule):
    r"""What VeLO and Celo have in common: fixed decays, 30 features, and a step that follows the size of the tensor.

    .. math:: p \leftarrow p - 0.001\, \eta\, \lambda \sqrt{\mathrm{mean}(p^2) + 10^{-9}}\; d\, e^{0.001 s}

    with :math:`\lambda` from an LSTM. Accumulators have no bias correction: three momenta m_k and factored second moments
    (R_k, C_k; vectors keep the whole) with decays .9, .99, .999, one second moment v with .999. Features, each divided by
    its RMS over the tensor: g, g clipped to 0.1, p, m_k, v, m_k r, r, factored g, g r, R_k, C_k, R_k^{-1/2}, C_k^{-1/2},
    factored m_k with :math:`r = (v + 10^{-6})^{-1/2}`; gradients are clipped to 1000 first.
    """

    needs_loss = True
    needs_horizon = True
    prepare_reads = PROGRESS

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned step; weights are for 1")
    hidden: int = option(4, low=1, doc="width of both hidden layers of the per-parameter network")
    layout: str = option(
        "torch", choices=("torch", "jax"), doc="which axis is the output one where sizes tie: the first, or the last"
    )

    @cached_property
    def features(self) -> Features:
        """See the class."""
        counts = len(MOMENTUM_DECAYS), len(RMS_DECAYS), len(FACTORED_DECAYS)
        return Features(VELO_BLOCKS, *counts, clip=1000.0, diagonal_eps=0.0, layout=self.layout)

    @property
    def magnitude(self) -> float:
        """The constant in the exponent."""
        return 0.001

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Of the per-parameter network; its third output is unused."""
        return (PARAMETER_FEATURES, self.hidden, self.hidden, OUTPUTS)

    def scales(self, params: Params, squares: Tensor, multiplier: Tensor, hp: HyperValues) -> dict[str, Tensor]:
        """What multiplies each tensor's direction, from the mean squares of the tensors and lambda, both [T]."""
        sizes = STEP_SCALE * torch.sqrt(squares + 1e-9) * multiplier
        if not isinstance(hp, PerParameter):
            return dict(zip(params, (sizes * hp["lr"]).unbind(0), strict=True))
        return {name: size * hp.of(name)["lr"] for name, size in zip(params, sizes.unbind(0), strict=True)}


class VeLO(TensorScaledRule):
    r"""An LSTM for each tensor writes the weights and the size of the steps of the tensor's own small network.

    Per tensor the LSTM sees 30 numbers: `progress_features`, then with :math:`N = \max(\mathrm{mean}(p^2), 10^{-9})^{-1/2}`
    and the accumulators before this step log(mean Nv), the number of axes longer than 1 (one-hot up to 4),
    :math:`\log \mathrm{mean}(N m_k - \overline{N m_k})^2` and :math:`\log \mathrm{mean}(N v - \overline{N m_k})^2` (about the
    mean of m, not of v: an oversight of the original that its weights have learned to live with); a log is
    0.5 clip(log(10 |x| + 1e-8), -5, 5). Tensors exchange information by a maximum (`mixing_lstm`). Linear heads of the LSTM
    give :math:`\lambda` and B numbers u_k; weights and biases of the network are :math:`W = 100\, \mathrm{mean}_k(u_k W_k)`,
    with B learned networks W_k. The step is that of `TensorScaledRule`.

    Metz et al., 2022, "VeLO: Training versatile learned optimizers by scaling up" (https://arxiv.org/abs/2211.09760),
    appendix B; HyperV2 in learned_optimization. Defaults are the sizes of the released weights, which are for lr = 1.
    """

    prepare_reads = (*PROGRESS, "momentum", "rms")
    lstm_hidden: int = option(512, low=1, doc="units of the LSTM")
    bank: int = option(256, low=1, doc="number B of networks that are mixed")
    mixing_scale: float = option(100.0, doc="multiplies the mixed weights; 1 in Celo's velo_s")
    short_loss_memory: bool = option(
        False, doc="all averages of the loss over 10 steps, as weights trained with use_bugged_loss_features expect"
    )
    forgetful: bool = option(
        False, doc="the LSTM starts afresh at every step, as weights trained with use_bugged_next_lstm_state expect"
    )

    def init_theta(self, generator: Generator) -> Theta:
        """Truncated normal weights of variance 1 / fan-in; biases and the LSTM's first row zero."""
        theta: Theta = {}
        networks = [random_layers(self.layer_sizes, generator) for _ in range(self.bank)]
        for i, layers in enumerate(zip(*networks, strict=True)):
            theta[f"mlp.w{i}"], theta[f"mlp.b{i}"] = map(torch.stack, zip(*layers, strict=True))
        statistics = len(RMS_DECAYS) + RANKS + 2 * len(MOMENTUM_DECAYS)
        init_mixing_lstm(theta, PROGRESS_FEATURES + statistics, self.lstm_hidden, generator)
        init_linear(theta, "lstm.control", self.lstm_hidden, self.bank, generator)
        init_linear(theta, "lstm.step", self.lstm_hidden, 1, generator)
        return theta

    def init_memory(self, theta: Theta, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """``hidden`` and ``cell`` [H], ``loss_mean`` and ``loss_min`` [10]; the loss is that of the whole run."""
        return start_progress(theta, params)

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """One row of the LSTM per tensor, and one product for all networks."""
        theta = for_params(theta, params)
        like = theta["lstm.hidden"]
        slowest = 10.0 if self.short_loss_memory else None
        progress, memory = progress_features(state, params, ctx, like, slowest)
        sizes, statistics = _tensor_features(params, state, like)
        old = {slot: rows(state, params, slot) for slot in ("hidden", "cell")}
        hidden, cell = mixing_lstm(theta, torch.cat([progress, statistics], 1), old["hidden"], old["cell"])
        memory |= old if self.forgetful else {"hidden": hidden, "cell": cell}
        controls = linear(theta, "lstm.control", hidden) * (self.mixing_scale / self.bank)
        networks = []
        for i in range(len(self.layer_sizes) - 1):
            mixed = [torch.tensordot(controls, theta[f"mlp.{kind}{i}"], 1).unbind(0) for kind in "wb"]
            networks.append(zip(*mixed, strict=True))
        layers = dict(zip(params, zip(*networks, strict=True), strict=True))
        scale = self.scales(params, sizes, linear(theta, "lstm.step", hidden).squeeze(1), hp)
        keep = dict.fromkeys(params, torch.ones_like(like[0]))
        return Prepared(constant_decays(like), layers, scale, keep, unrows(params, memory))

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of learned_optimization."""
        control = linears_from_original(arrays, {"lstm.control": "rnn_params/rnn_to_controls"})
        return networks_from_original(arrays) | mixing_lstm_from_original(arrays) | control


def networks_from_original(arrays: Mapping[str, Tensor]) -> Theta:
    """``mlp.w{i}`` [B, in, out] and ``mlp.b{i}`` [B, out]; the original splits the first layer by blocks of features."""
    found = {f"mlp.{name}": arrays[f"ff_mod_stack/~/{name}"] for name in ("b0", "w1", "b1", "w2", "b2")}
    return found | {"mlp.w0": torch.cat([arrays[f"ff_mod_stack/~/w0__{i}"] for i in range(len(VELO_BLOCKS))], -2)}


def _tensor_features(params: Params, state: State, like: Tensor) -> tuple[Tensor, Tensor]:
    """mean(p^2) [T], and what the LSTM sees of each tensor [T, 12]: log mean v, rank, log var m, log var v about mean m."""
    names = tuple(params)
    found = [moments([state[name][slot] for name in names]) for slot in ("rms", "momentum")]
    size = mean_squares(tuple(params.values())).to(like.dtype).unsqueeze(1)
    mean_v, var_v, mean_m, var_m = (value.to(like.dtype) for pair in found for value in pair)
    axes = [sum(length > 1 for length in param.shape) for param in params.values()]
    ranks = like.new_tensor([[float(count == i) for i in range(RANKS)] for count in axes])
    inverse = size.clamp(min=1e-9).rsqrt()
    logs = [inverse * mean_v, inverse.square() * var_m, inverse.square() * (var_v + (mean_v - mean_m).square())]
    mean, var, about = (0.5 * clipped_log(10 * value) for value in logs)
    return size.squeeze(1), torch.cat([mean, ranks, var, about], 1)
