"""RNN-MLP: an LSTM for each tensor and a network for each parameter that write to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Generator, Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import Features, random_layers, run_layers
from metaopt.perparameter.features import accumulate, inputs, zero_slots
from metaopt.perparameter.rule import TIME_SCALES
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, compute_dtype, hp_of
from metaopt.space import hyper, option
from metaopt_learned.recurrent import (
    clipped_log,
    for_params,
    init_linear,
    init_lstm,
    linear,
    linears_from_original,
    lstm,
    lstm_from_original,
    mean_squares,
    moments,
    own,
    rows,
    start_rows,
    steps_made,
    unrows,
)

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
PARAMETER_FEATURES = 3 + 4 * len(DECAYS)
TENSOR_FEATURES = 18
TO_LSTM, FROM_LSTMS, TO_MLP = 16, 18, 17
TRAIN_DECAY, VALID_DECAY, CLIP_DECAY = 0.9, 0.95, 0.99


class RNNMLP(LearnedRule):
    r"""A network for each parameter, told what to do by an LSTM for its tensor.

    .. math:: p \leftarrow p - 0.001\, \eta\, d\, e^{0.001 s}, \qquad (d, s, \mu) = \mathrm{MLP}_{54 \to H \to H \to 18}

    The network sees g, p, log(|p| + 1e-8), momenta m_k, second moments v_k, :math:`m_k (v_k + 10^{-6})^{-1/2}` and
    :math:`(v_k + 10^{-6})^{-1/2}` for decays .5, .9, .99, .999 and .9999, each divided by its RMS over the tensor; then
    :math:`\sin(t / (\pi \tau_j))` for eleven time scales, log(number of tensors) - 1, log of the tensor's norm and of its size,
    and 17 numbers from the tensor's LSTM. The LSTM sees moments of m, v, p and g of its tensor, the tensor's shape,
    normalised losses, the mean over the tensor of the network's 16 other outputs :math:`\mu`, and 18 numbers that are the mean
    over all LSTMs of a linear map of their outputs; the last two from one step before. Gradients are clipped to ten times an
    average of their RMS. A loss L is seen as
    :math:`\mathrm{clip}((L - \hat m) / \sqrt{\hat s + 10^{-8}}, -5, 5)`, with averages of the training loss and its
    squared deviation. Metz et al., 2020, "Tasks, stability, architecture, and compute" (https://arxiv.org/abs/2009.11243).

    State per parameter besides ``step``, accumulators and the LSTM's row: ``to_lstm`` [16], ``from_lstms`` [18],
    ``train_loss`` and ``valid_loss`` [3] (mean, squared deviation, count) and ``clip`` [2] (RMS, count).
    """

    needs_loss = True

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the learned step")
    hidden: int = option(32, low=1, doc="width H of both hidden layers of the per-parameter network")
    lstm_hidden: int = option(64, low=1, doc="units of the LSTM")
    layout: str = option(
        "torch", choices=("torch", "jax"), doc="whether weights are (out, in, *kernel) or (*kernel, in, out)"
    )

    @cached_property
    def features(self) -> Features:
        """What the network sees of a parameter."""
        blocks = ("g", "p", "log_abs_p", "m", "v", "m_r", "r")
        return Features(blocks, len(DECAYS), len(DECAYS), 0, layout=self.layout)

    def init_theta(self, generator: Generator) -> Theta:
        """Truncated normal weights of variance 1 / fan-in, and such first messages; biases and the LSTM's first row zero."""
        theta: Theta = {}
        sizes = (PARAMETER_FEATURES + len(TIME_SCALES) + 3 + TO_MLP, self.hidden, self.hidden, 2 + TO_LSTM)
        for i, (weight, bias) in enumerate(random_layers(sizes, generator)):
            theta[f"mlp.w{i}"], theta[f"mlp.b{i}"] = weight, bias
        init_lstm(theta, TENSOR_FEATURES + TO_LSTM + FROM_LSTMS, self.lstm_hidden, generator)
        init_linear(theta, "lstm.to_mlp", self.lstm_hidden, TO_MLP, generator)
        init_linear(theta, "lstm.to_lstms", self.lstm_hidden, FROM_LSTMS, generator)
        for name, size in (("mlp.to_lstm", TO_LSTM), ("lstm.from_lstms", FROM_LSTMS)):
            theta[name] = random_layers((size, 1), generator)[0][0].squeeze(1)
        return theta

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """See the class."""
        state = start_rows(theta, params)
        for name, param in params.items():
            row = state[name]["hidden"]
            state[name] |= {
                "step": torch.zeros((), dtype=torch.int64, device=param.device),
                **zero_slots(self.features, param.to(compute_dtype(param.dtype))),
                "to_lstm": own(theta["mlp.to_lstm"], param),
                "from_lstms": own(theta["lstm.from_lstms"], param),
                "train_loss": row.new_zeros(3),
                "valid_loss": row.new_zeros(3),
                "clip": row.new_tensor([1 - CLIP_DECAY, 1.0]),
            }
        return state

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        theta = for_params(theta, params)
        like = theta["lstm.hidden"]
        memory = {slot: rows(state, params, slot) for slot in _MEMORY}
        wide = {name: param.to(compute_dtype(param.dtype)) for name, param in params.items()}
        grads, memory["clip"] = _clipped({name: grads[name].to(p.dtype) for name, p in wide.items()}, memory["clip"])
        decays = {kind: like.new_tensor(DECAYS) for kind in ("momentum", "rms")}
        slots = {name: accumulate(self.features, decays, grads[name], state[name]) for name in wide}
        loss = torch.as_tensor(ctx.loss, dtype=like.dtype, device=like.device)
        memory["train_loss"] = _averaged(memory["train_loss"], loss, TRAIN_DECAY)
        norms = torch.stack([torch.linalg.vector_norm(p) for p in wide.values()]).to(like.dtype)
        seen = torch.cat(
            [memory["from_lstms"], memory["to_lstm"], self._tensor_features(wide, grads, slots, norms, loss, memory)], 1
        )
        memory["hidden"], memory["cell"] = lstm(theta, seen, memory["hidden"], memory["cell"])
        messages = linear(theta, "lstm.to_lstms", memory["hidden"]).mean(0)
        memory["from_lstms"] = messages.expand_as(memory["from_lstms"])
        shared = [*_network_features(wide, norms, steps_made(state, params, ctx, like))]
        shared.append(linear(theta, "lstm.to_mlp", memory["hidden"]))
        biases = (theta["mlp.b0"] + torch.cat(shared, 1) @ theta["mlp.w0"][PARAMETER_FEATURES:]).unbind(0)
        rest = tuple((theta[f"mlp.w{i}"], theta[f"mlp.b{i}"]) for i in (1, 2))
        new_params, written = {}, []
        for (name, param), bias in zip(wide.items(), biases, strict=True):
            layers = ((theta["mlp.w0"][:PARAMETER_FEATURES], bias), *rest)
            outputs = run_layers(layers, inputs(self.features, param, grads[name], slots[name], decays))
            moved = 0.001 * hp_of(hp, name)["lr"] * outputs[0] * torch.exp(0.001 * outputs[1])
            new_params[name] = (param - moved).to(params[name].dtype)
            written.append(outputs[2:])
        memory["to_lstm"] = moments(written)[0].to(like.dtype)
        kept = unrows(params, memory)
        return new_params, {name: {"step": state[name]["step"] + 1, **slots[name], **kept[name]} for name in params}

    def with_validation_loss(self, state: State, loss: Tensor | float) -> State:
        """``state`` that knows of one more loss on validation data; it counts as a step, as in the original."""
        new = {}
        for name, slots in state.items():
            mean = slots["valid_loss"]
            seen = torch.as_tensor(loss, dtype=mean.dtype, device=mean.device)
            valid = _averaged(mean.unsqueeze(0), seen, VALID_DECAY).squeeze(0)
            new[name] = {**slots, "step": slots["step"] + 1, "valid_loss": valid}
        return new

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of learned_optimization."""
        layers = {f"mlp.{kind}{i}": arrays[f"ffmod_params/mlp/~/linear_{i}/{kind}"] for i in range(3) for kind in "wb"}
        heads = {"lstm.to_mlp": "rnn_to_ff_params/rnn_to_ff", "lstm.to_lstms": "rnn_to_in_params/rnn_to_in"}
        first = {"mlp.to_lstm": arrays["initial_from_mlp"], "lstm.from_lstms": arrays["initial_from_lstm"]}
        return layers | lstm_from_original(arrays) | linears_from_original(arrays, heads) | first

    def _tensor_features(
        self, params: Params, grads: Params, slots: State, norms: Tensor, loss: Tensor, memory: Mapping[str, Tensor]
    ) -> Tensor:
        """What an LSTM sees besides messages, [T, 18]."""
        like = memory["hidden"]
        found, facts = [], []
        for name, param in params.items():
            values = (slots[name]["momentum"], slots[name]["rms"], param)
            about = torch.cat(moments([value.unsqueeze(0) for value in values]), 1).reshape(-1)
            found.append(torch.cat([torch.linalg.vector_norm(grads[name]).unsqueeze(0), about]))
            shape = tuple(param.shape) if self.layout == "jax" else (*param.shape[2:], *param.shape[1::-1])
            facts.append(
                [1.0 if not shape else -1.0, *(math.log(max(size, 1)) - 1 for size in (*shape, 1, 1, 1, 1)[:4])]
            )
        of_g, mean_m, var_m, mean_v, var_v, mean_p, var_p = torch.stack(found).to(like.dtype).split(1, 1)
        is_scalar, shapes = like.new_tensor(facts).split((1, 4), 1)
        means = [part for mean in (mean_m, mean_v, mean_p) for part in (clipped_log(mean), torch.sign(mean))]
        valid = memory["valid_loss"]
        valid_loss = valid[:, 0] / (1 - VALID_DECAY ** valid[:, 2] + 1e-8)
        losses = [_normalised(memory["train_loss"], value).unsqueeze(1) for value in (loss, valid_loss)]
        spreads = [clipped_log(value) for value in (var_m, var_v, var_p)]
        return torch.cat(
            [clipped_log(of_g), is_scalar, *means, clipped_log(norms).unsqueeze(1), shapes, *losses, *spreads], 1
        )


def _network_features(params: Params, norms: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """What the network sees of step and tensor: time [T, 11], number of tensors, norm and size [T, 1]."""
    time = torch.sin(t.unsqueeze(1) / (t.new_tensor(TIME_SCALES) * math.pi))
    sizes = t.new_tensor([[math.log(max(param.numel(), 1))] for param in params.values()])
    return time, torch.full_like(sizes, math.log(len(params)) - 1), torch.log(norms + 1e-8).unsqueeze(1), sizes


_MEMORY = ("hidden", "cell", "to_lstm", "from_lstms", "train_loss", "valid_loss", "clip")


def _averaged(average: Tensor, loss: Tensor, decay: float) -> Tensor:
    """Mean, squared deviation and count [T, 3] after one more loss."""
    mean, var, count = average.unbind(1)
    mean = decay * mean + (1 - decay) * loss
    return torch.stack([mean, decay * var + (1 - decay) * (mean - loss).square(), count + 1], 1)


def _normalised(average: Tensor, loss: Tensor) -> Tensor:
    """A loss as the LSTMs see it, [T]."""
    mean, var, count = average.unbind(1)
    weight = 1 - TRAIN_DECAY**count + 1e-8
    return ((loss - mean / weight) * torch.rsqrt(var / weight + 1e-8)).clamp(-5, 5)


def _clipped(grads: Params, clip: Tensor) -> tuple[Params, Tensor]:
    """Clipped gradients, and the new RMS and count [T, 2]."""
    rms, count = clip.unbind(1)
    bounds = (10 * rms / (1 - CLIP_DECAY**count)).unbind(0)
    found = {
        name: torch.minimum(torch.maximum(grad, -bound.to(grad.dtype)), bound.to(grad.dtype))
        for (name, grad), bound in zip(grads.items(), bounds, strict=True)
    }
    now = torch.sqrt(1e-8 + mean_squares(tuple(found.values())).mean()).to(clip.dtype)
    return found, torch.stack([CLIP_DECAY * rms + (1 - CLIP_DECAY) * now, count + 1], 1)
