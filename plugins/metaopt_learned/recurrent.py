"""What recurrent learned optimizers share: one LSTM row per tensor, and what it sees of a training run.

Rows and loss averages are slots of each parameter's state, so parameters that have no gradient do not take part, and every
form of saving works. All functions take the rows of T parameters at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.perparameter import random_layers
from metaopt.rule import Context, Params, State, compute_dtype

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
LOSS_AVERAGES = 10
PROGRESS_FEATURES = len(FRACTIONS) + LOSS_AVERAGES - 1
PROGRESS: tuple[str, ...] = ("hidden", "cell", "loss_mean", "loss_min")
"""The slots of `start_progress`."""
SHORTEST = 10.0
"""Time constant of the fastest average of the loss, in steps."""
_PIECE = 65_536
"""Elements of a tensor whose moments are taken at once, so that they stay in the cache."""


# --- networks ---------------------------------------------------------------------------------------------------------


def init_linear(theta: Theta, name: str, inputs: int, outputs: int, generator: Generator) -> None:
    """Add ``{name}_w`` [inputs, outputs], truncated normal of variance 1 / inputs, and ``{name}_b``, zero."""
    ((theta[f"{name}_w"], theta[f"{name}_b"]),) = random_layers((inputs, outputs), generator)


def linear(theta: Theta, name: str, inputs: Tensor) -> Tensor:
    """``inputs`` [T, in] -> [T, out]."""
    return inputs @ theta[f"{name}_w"] + theta[f"{name}_b"]


def init_lstm(theta: Theta, inputs: int, hidden: int, generator: Generator) -> None:
    """Add the weights of `lstm`, and the row at the start of training, zero, that is learned too."""
    init_linear(theta, "lstm.gates", inputs + hidden, 4 * hidden, generator)
    theta["lstm.hidden"], theta["lstm.cell"] = torch.zeros(hidden), torch.zeros(hidden)


def lstm(theta: Theta, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step of an LSTM; returns new ``hidden`` and ``cell`` [T, H].

    .. math:: (i, z, f, o) = [x, h] W + b, \quad c \leftarrow \sigma(f + 1)\, c + \sigma(i) \tanh z,
        \quad h \leftarrow \sigma(o) \tanh c

    Order and forget bias are those of dm-haiku, in which the published weights were trained.
    """
    i, z, f, o = linear(theta, "lstm.gates", torch.cat([inputs, hidden], -1)).chunk(4, -1)
    cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def init_mixing_lstm(theta: Theta, inputs: int, hidden: int, generator: Generator) -> None:
    """Add the weights of `mixing_lstm`."""
    init_linear(theta, "lstm.mix", inputs, hidden, generator)
    init_linear(theta, "lstm.in", inputs, hidden, generator)
    init_lstm(theta, hidden, hidden, generator)


def mixing_lstm(theta: Theta, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """As `lstm`, on a linear map of the tensor's own inputs plus the greatest of relu(mix) over all tensors.

    The JAX originals have one more layer (``rnn_params/linear``), whose output nothing uses; it has no counterpart here.
    """
    shared = torch.relu(linear(theta, "lstm.mix", inputs)).amax(0, keepdim=True)
    return lstm(theta, linear(theta, "lstm.in", inputs) + shared, hidden, cell)


# --- weights of the JAX originals -------------------------------------------------------------------------------------


def linears_from_original(arrays: Mapping[str, Tensor], names: Mapping[str, str]) -> Theta:
    """Weights and biases of linear layers: our name -> the original's."""
    return {f"{ours}_{kind}": arrays[f"{theirs}/{kind}"] for ours, theirs in names.items() for kind in "wb"}


def lstm_from_original(arrays: Mapping[str, Tensor]) -> Theta:
    """The weights of `lstm` and the first row."""
    first = {f"lstm.{slot}": arrays[f"lstm_init_state/{slot}"].squeeze(0) for slot in ("hidden", "cell")}
    return linears_from_original(arrays, {"lstm.gates": "rnn_params/rnn/linear"}) | first


def mixing_lstm_from_original(arrays: Mapping[str, Tensor]) -> Theta:
    """The weights of `mixing_lstm` and of the head ``lstm.step``."""
    layers = {"lstm.mix": "linear_1", "lstm.in": "linear_2", "lstm.step": "step_size"}
    names = {ours: f"rnn_params/{theirs}" for ours, theirs in layers.items()}
    return lstm_from_original(arrays) | linears_from_original(arrays, names)


# --- state ------------------------------------------------------------------------------------------------------------


def for_params(theta: Theta, params: Params) -> Theta:
    """Theta in the widest dtype that a parameter is computed in."""
    dtype = functools.reduce(torch.promote_types, {compute_dtype(param.dtype) for param in params.values()})
    return {name: value.to(dtype) for name, value in theta.items()}


def own(value: Tensor, param: Tensor) -> Tensor:
    """A copy of a part of theta as a slot of ``param``'s state."""
    return value.to(param.device, compute_dtype(param.dtype), copy=True)


def start_rows(theta: Theta, params: Params) -> State:
    """``hidden`` and ``cell`` [H] of each parameter before the first step."""
    return {
        name: {slot: own(theta[f"lstm.{slot}"], param) for slot in ("hidden", "cell")} for name, param in params.items()
    }


def start_progress(theta: Theta, params: Params) -> State:
    """`start_rows`, and what `progress_features` keeps."""
    state = start_rows(theta, params)
    for slots in state.values():
        slots["loss_mean"] = slots["hidden"].new_zeros(LOSS_AVERAGES)
        slots["loss_min"] = slots["hidden"].new_full((LOSS_AVERAGES,), 999999999999.0)
    return state


def rows(state: State, names: Iterable[str], slot: str) -> Tensor:
    """One slot of T parameters as [T, ...], in the widest of their dtypes."""
    return torch.stack([state[name][slot] for name in names])


def unrows(params: Params, slots: Mapping[str, Tensor]) -> State:
    """Inverse of `rows`, for several slots."""
    columns = zip(*(values.unbind(0) for values in slots.values()), strict=True)
    return {
        name: {slot: value.to(compute_dtype(param.dtype)) for slot, value in zip(slots, column, strict=True)}
        for (name, param), column in zip(params.items(), columns, strict=True)
    }


def steps_made(state: State, names: Iterable[str], ctx: Context, like: Tensor) -> Tensor:
    """Updates that each parameter has had, [T], in ``like``'s dtype."""
    names = tuple(names)
    made = rows(state, names, "step") if ctx.step is None else ctx.step.expand(len(names))
    return made.to(like.dtype)


# --- features ---------------------------------------------------------------------------------------------------------


def clipped_log(x: Tensor) -> Tensor:
    """log(|x| + 1e-8), clipped to [-5, 5]."""
    return torch.log(1e-8 + x.abs()).clamp(-5, 5)


def mean_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements of each tensor, [T]; 0 if it has none. Of `compute_dtype`, to which narrow tensors are widened."""
    norms = torch.stack([_norm(x) for x in tensors])
    return norms.square() / norms.new_tensor([max(x.numel(), 1) for x in tensors])


def _norm(x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    if x.dtype == dtype or not x.is_cpu:  # a GPU widens as it reads
        return torch.linalg.vector_norm(x, dtype=dtype)
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(piece.to(dtype)) for piece in x.reshape(-1).split(_PIECE)])
    )


def moments(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance [T, n] of each plane of each of ``tensors`` [n, *shape]; 0 if it has no elements."""
    flat = [x.reshape(len(x), math.prod(x.shape[1:])) for x in tensors]
    # torch's own is one launch, and ten times slower on a CPU
    return _moments_by_pieces(flat) if flat[0].is_cpu else _moments_at_once(flat)


def _moments_at_once(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    found = [torch.var_mean(x, 1, correction=0) if x.shape[1] else (x.sum(1), x.sum(1)) for x in rows]
    var, mean = (torch.stack(values) for values in zip(*found, strict=True))
    return mean, var


def _moments_by_pieces(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    sums = torch.stack([x.sum(1) for x in rows])
    sizes = sums.new_tensor([[max(x.shape[1], 1)] for x in rows])
    mean = sums / sizes
    deviations = []
    for x, middle in zip(rows, mean.unsqueeze(2), strict=True):
        pieces = [torch.linalg.vector_norm(piece - middle, dim=1) for piece in x.split(_PIECE, 1)]
        deviations.append(pieces[0] if len(pieces) == 1 else torch.linalg.vector_norm(torch.stack(pieces), dim=0))
    return mean, torch.stack(deviations).square() / sizes


def progress_features(
    state: State, names: Iterable[str], ctx: Context, like: Tensor, slowest: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""How far training is and how the loss does: [T, 18], and the new ``loss_mean`` and ``loss_min`` [T, 10].

    With t updates made of a horizon of n: tanh(10 (t/n - s)) for nine fractions s, then nine features of averages of the
    loss L with time constants :math:`h_j` from 10 to n steps, evenly on a log scale, and :math:`q_j = e^{-1/h_j}`:

    .. math:: L' = \min(2 |\max_j c_j|, L) \text{ (L itself at t = 0)}, \quad
        m_j \leftarrow q_j m_j + (1 - q_j) L', \quad c_j = m_j / (1 - q_j^{t+1}), \quad l_j \leftarrow \min(l_j, c_j)

    .. math:: \mathrm{clip}\left(\frac{c_j - l_j}{\max(10^{-8}, c_{j+1} - l_j)} - 1, -1, 1\right),
        \text{ and 0 in the first two steps.}

    Metz et al., 2022, "VeLO" (https://arxiv.org/abs/2211.09760), appendix B.

    Args:
        state: before the step.
        names: of the T parameters.
        ctx: of the step; loss and horizon are used.
        like: gives dtype and device.
        slowest: the longest time constant, where it is not the horizon.
    """
    names = tuple(names)
    t = steps_made(state, names, ctx, like).unsqueeze(1)
    horizon = torch.as_tensor(ctx.horizon, dtype=like.dtype, device=like.device)
    left = torch.tanh(10 * (t / horizon - torch.tensor(FRACTIONS, dtype=like.dtype, device=like.device)))
    spread = torch.linspace(0, 1, LOSS_AVERAGES, dtype=like.dtype, device=like.device)
    rate = 1 / (SHORTEST * ((horizon if slowest is None else slowest) / SHORTEST) ** spread)
    mean, minimum = rows(state, names, "loss_mean"), rows(state, names, "loss_min")
    loss = torch.as_tensor(ctx.loss, dtype=like.dtype, device=like.device)
    weight = -torch.expm1(-rate * (t + 1))  # of all steps together: 1 - q^(t + 1)
    ceiling = 2 * (mean / weight).amax(1, keepdim=True).abs()
    seen = torch.where(t == 0, loss, torch.minimum(ceiling, loss))
    mean = mean * torch.exp(-rate) - seen * torch.expm1(-rate)
    now = mean / weight
    minimum = torch.minimum(minimum, now)
    best = minimum[:, :-1]
    relative = (now[:, :-1] - best) / (now[:, 1:] - best).clamp(min=1e-8) - 1
    trend = torch.where(t < 2, torch.zeros_like(relative), relative.clamp(-1, 1))
    return torch.cat([left, trend], 1), {"loss_mean": mean, "loss_min": minimum}
