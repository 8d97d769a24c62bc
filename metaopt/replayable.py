"""Stock ``torch.nn`` layers under ``vmap``, with random numbers that can be replayed.

Inside a `Replayable` block, dropout draws from a key, attention and recurrent layers are computed by their formulas (torch's
fused kernels run copy by copy under ``vmap``, or not at all), and other randomness is refused.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metaopt.random import normal, uniform


class Replayable(TorchFunctionMode):
    """Random layers inside draw from one key instead of torch's generator; everything inside is open to ``vmap``.

    Args:
        key: 0-d int64, see `metaopt.random`; None where nothing may be drawn.
    """

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key, self.draws = key, 0

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSED and not _judges(func, args, kwargs):
            raise NotImplementedError(
                f"the module draws random numbers by {func.__name__}, which cannot be replayed; use nn.Dropout and its"
                " like, torch.rand_like or torch.randn_like"
            )
        replacement = getattr(self, _REPLACED.get(func, ""), None)
        if replacement is None and func is F.multi_head_attention_forward:
            replacement = self._reading_ours(func)
        return (replacement or func)(*args, **kwargs)

    def _reading_ours(self, function: Any) -> Any:
        """A function of torch's, calling our replacements: a mode is off while it handles the outer function."""
        ours = {f.__name__: getattr(self, name) for f, name in _REPLACED.items()}
        names = {**function.__globals__, **ours, "has_torch_function": lambda _: False}
        return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)

    def _key(self) -> tuple[Tensor, int]:
        if self.key is None:
            raise ValueError("the module draws random numbers, so its batch needs a key: batch['random'], a 0-d int64")
        self.draws += 1
        return self.key, self.draws

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Zero each number with probability p, and divide the others by 1 - p."""
        return self._dropped(input, tuple(input.shape), p, training)

    def feature_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Zero whole channels of ``input`` [B, C, ...]."""
        return self._dropped(input, (*input.shape[:2], *(1 for _ in input.shape[2:])), p, training)

    def dropout1d(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Zero whole channels of ``input`` [..., C, L]."""
        return self._dropped(input, (*input.shape[:-1], 1), p, training)

    def dropout3d(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Zero whole channels of ``input`` [..., C, D, H, W]."""
        return self._dropped(input, (*input.shape[:-3], 1, 1, 1), p, training)

    def _dropped(self, input: Tensor, shape: tuple[int, ...], p: float, training: bool) -> Tensor:
        if not training or p == 0:
            return input
        key, stream = self._key()
        return input * (uniform(key, shape, stream) >= p).to(input.dtype) / (1 - p) if p < 1 else input * 0

    def rand_like(self, input: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Uniform numbers in (0, 1)."""
        return uniform(*self._drawn(input), dtype or input.dtype)

    def randn_like(self, input: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Standard normal numbers."""
        return normal(*self._drawn(input), dtype or input.dtype)

    def _drawn(self, input: Tensor) -> tuple[Tensor, torch.Size, int]:
        key, stream = self._key()
        return key, input.shape, stream

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """softmax(query key' scale + mask) value, as ``F.scaled_dot_product_attention``; rows that see nothing give 0."""
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        if attn_mask is None:
            weights = scores.softmax(-1)
        else:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
            blind = (scores == -math.inf).all(-1, keepdim=True)
            weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        return self.dropout(weights, dropout_p) @ value

    def left_aligned(self, *_: Any) -> bool:
        """Whether padding is on the right only: "no" keeps ``nn.TransformerEncoder`` from building nested tensors."""
        return False

    def lstm(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As ``nn.LSTM``."""
        output, (hidden, cell) = self._recurrent(_lstm_step, arguments)
        return output, hidden, cell

    def gru(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As ``nn.GRU``."""
        output, (hidden,) = self._recurrent(_gru_step, arguments)
        return output, hidden

    def rnn_tanh(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As ``nn.RNN``."""
        output, (hidden,) = self._recurrent(_tanh_step, arguments)
        return output, hidden

    def rnn_relu(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As ``nn.RNN`` with ``nonlinearity="relu"``."""
        output, (hidden,) = self._recurrent(_relu_step, arguments)
        return output, hidden

    def lstm_cell(self, x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
        """As ``nn.LSTMCell``."""
        hidden, cell = _cell(_lstm_step, x, list(state), *weights)
        return hidden, cell

    def gru_cell(self, x: Tensor, state: Tensor, *weights: Any) -> Tensor:
        """As ``nn.GRUCell``."""
        return _cell(_gru_step, x, [state], *weights)[0]

    def rnn_tanh_cell(self, x: Tensor, state: Tensor, *weights: Any) -> Tensor:
        """As ``nn.RNNCell``."""
        return _cell(_tanh_step, x, [state], *weights)[0]

    def rnn_relu_cell(self, x: Tensor, state: Tensor, *weights: Any) -> Tensor:
        """As ``nn.RNNCell`` with ``nonlinearity="relu"``."""
        return _cell(_relu_step, x, [state], *weights)[0]

    def weight_norm(self, direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
        """``direction`` scaled to ``length`` over all dimensions but ``dim``, as ``parametrizations.weight_norm``."""
        others = [i for i in range(direction.dim()) if i != dim % direction.dim() or dim == -1]
        return direction * (length / torch.linalg.vector_norm(direction, dim=others, keepdim=True))

    def _recurrent(self, step: _Step, arguments: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Layers of a recurrent network; ``arguments`` as torch's own functions take them, step by step in Python."""
        if not isinstance(arguments[2], list | tuple):
            raise NotImplementedError("packed sequences do not vmap; pass padded tensors to the recurrent layer")
        x, start, flat, biases, layers, dropout, training, both_ways, batch_first = arguments
        start = start if isinstance(start, list | tuple) else [start]
        directions = 2 if both_ways else 1
        per_layer = len(flat) // (layers * directions)  # two weights, two biases, and an LSTM's projection
        projected = per_layer == (5 if biases else 3)
        x = x.transpose(0, 1) if batch_first else x
        ends = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                w_in, w_state, *rest = flat[at * per_layer : (at + 1) * per_layer]
                b_in, b_state = rest[:2] if biases else (None, None)
                gates = F.linear(x, w_in, b_in)
                state = [s[at] for s in start]
                hidden = []
                for gate in reversed(gates.unbind()) if direction else gates.unbind():
                    state = step(gate, F.linear(state[0], w_state, b_state), state)
                    if projected:
                        state[0] = F.linear(state[0], rest[-1])
                    hidden.append(state[0])
                outputs.append(torch.stack(hidden[::-1] if direction else hidden))
                ends.append(state)
            x = torch.cat(outputs, -1)
            if layer < layers - 1:
                x = self.dropout(x, dropout, training)
        return x.transpose(0, 1) if batch_first else x, [torch.stack(s) for s in zip(*ends, strict=True)]


_Step = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]
"""(gates of the input, gates of the hidden state, old state) -> new state, the hidden state first."""


def _cell(
    step: _Step, x: Tensor, state: list[Tensor], w_in: Tensor, w_state: Tensor, b_in: Any = None, b_state: Any = None
) -> list[Tensor]:
    return step(F.linear(x, w_in, b_in), F.linear(state[0], w_state, b_state), state)


def _lstm_step(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * cell.tanh(), cell]


def _gru_step(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    new, z = (xn + (xr + hr).sigmoid() * hn).tanh(), (xz + hz).sigmoid()
    return [new + z * (state[0] - new)]


def _tanh_step(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [(x + h).tanh()]


def _relu_step(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [(x + h).relu()]


_REPLACED: dict[Any, str] = {
    F.dropout: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "feature_dropout",
    F.dropout3d: "dropout3d",
    F.scaled_dot_product_attention: "attention",
    torch.rand_like: "rand_like",
    torch.randn_like: "randn_like",
    torch._nested_tensor_from_mask_left_aligned: "left_aligned",
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
    torch.lstm_cell: "lstm_cell",
    torch.gru_cell: "gru_cell",
    torch.rnn_tanh_cell: "rnn_tanh_cell",
    torch.rnn_relu_cell: "rnn_relu_cell",
    torch._weight_norm: "weight_norm",
}

_REFUSED = {
    *(getattr(torch, name) for name in (
        "rand", "randn", "randint", "randint_like", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial",
        "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_",
        "feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout", "rrelu", "rrelu_",
    )),
    *(getattr(Tensor, name) for name in (
        "bernoulli", "bernoulli_", "multinomial", "normal_", "uniform_", "random_", "exponential_", "cauchy_",
        "log_normal_", "geometric_",
    )),
    F.alpha_dropout, F.feature_alpha_dropout, F.gumbel_softmax, F.rrelu,
    F.fractional_max_pool2d, F.fractional_max_pool3d,
    F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices,
}  # fmt: skip


def _judges(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer was told that it is not training, where it draws nothing."""
    if not isinstance(function, types.FunctionType):
        return False
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments.get("training") is False
