"""Recurrent language models (RNN, GRU, LSTM), with cells written out: ``vmap`` cannot take torch's fused ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.choices import require_choice
from metaopt_tasks.language import LanguageModel, load_tokens
from metaopt_tasks.layers import INITIALIZERS, hidden_weight, linear, output_weight

GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
"""Cell -> how many blocks of ``width`` rows its matrices have."""

RECURRENT_INITIALIZERS = (*INITIALIZERS, "identity")


@dataclass(eq=False)
class RecurrentLM(LanguageModel):
    """Token embedding -> layers of cells, each unrolled over the whole context from a zero state -> linear head.

    Attributes:
        cell: as torch's of that name: ``tanh`` or ``relu`` (Elman 1990), ``gru`` (Cho et al. 2014, arXiv:1406.1078), or
            ``lstm`` (Hochreiter and Schmidhuber 1997, with the forget gates of Gers et al. 2000).
        width: of the states.
        layers: how many cells are stacked.
        embedding: width of the tokens' vectors; 0 for ``width``.
        recurrent: how state-to-state matrices start, each gate by itself: a name in `metaopt_tasks.layers.INITIALIZERS`,
            or ``identity``, with which a relu cell is an IRNN (Le et al. 2015, arXiv:1504.00941).
        recurrent_scale: multiplies them.
        forget_bias: at the start, of an LSTM's forget gates (1: Jozefowicz et al. 2015).
    """

    cell: str = "gru"
    width: int = 32
    layers: int = 1
    embedding: int = 0
    recurrent: str = "orthogonal"
    recurrent_scale: float = 1.0
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        require_choice("cell", self.cell, GATES)
        require_choice("recurrent", self.recurrent, RECURRENT_INITIALIZERS)

    def init(self, generator: Generator) -> Params:
        """Unit normal embeddings, LeCun normal input matrices, recurrent ones as asked, zero biases, a small head."""
        d, gates = self.width, GATES[self.cell]
        inputs = self.embedding or d
        params = {"token.embedding": torch.randn(self.classes, inputs, generator=generator)}
        for i in range(self.layers):
            bias = torch.zeros(gates, d)
            if self.cell == "lstm":
                bias[1] = self.forget_bias
            params |= {
                f"cell{i}.in.weight": hidden_weight((gates * d, inputs), generator),
                f"cell{i}.in.bias": bias.flatten(),
                f"cell{i}.state.weight": torch.cat([self._recurrent_block(generator) for _ in range(gates)]),
            }
            if self.cell == "gru":
                params[f"cell{i}.state.bias"] = torch.zeros(d)
            inputs = d
        return params | {
            "head.weight": output_weight((self.classes, d), generator),
            "head.bias": torch.zeros(self.classes),
        }

    def _recurrent_block(self, generator: Generator) -> Tensor:
        if self.recurrent == "identity":
            return self.recurrent_scale * torch.eye(self.width)
        return hidden_weight((self.width, self.width), generator, self.recurrent_scale, self.recurrent)

    def info(self) -> dict[str, ParamInfo]:
        """The embedding, the head, biases; the cells' matrices are hidden."""
        params = self.init(Generator().manual_seed(0))
        return infer_info(params, {name: "hidden" for name in params if name.startswith("cell") and "weight" in name})

    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        """Tokens [B, T] int64, T at most ``context`` -> logits [B, T, classes]."""
        h = F.embedding(tokens.T, params["token.embedding"])  # time first: a step's slice is then contiguous
        for i in range(self.layers):
            of_state = [params[name] for name in (f"cell{i}.state.weight", f"cell{i}.state.bias") if name in params]
            h = _CELLS[self.cell](linear(params, f"cell{i}.in", h), *of_state)
        return linear(params, "head", h).transpose(0, 1)


def elman_cell(x: Tensor, weight: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """States h_t = activation(x_t + W h_(t-1)) [T, B, width]; ``x`` [T, B, width] is what inputs and biases bring."""
    states: list[Tensor] = []
    for part in x.unbind(0):
        states.append(activation(part + F.linear(states[-1], weight) if states else part))
    return torch.stack(states)


def gru_cell(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """States [T, B, width] of a gated recurrent unit.

    r, z = sigmoid(x + W h), n = tanh(x + r (W h + bias)), new h = (1 - z) n + z h, with the rows of W [3 width, width] and
    the columns of ``x`` [T, B, 3 width], biases included, in the order r, z, n.
    """
    d = weight.shape[1]
    h = x[0, :, :d].new_zeros(x.shape[1], d)
    states = []
    for part in x.unbind(0):
        mixed = F.linear(h, weight)
        r, z = torch.sigmoid(part[:, : 2 * d] + mixed[:, : 2 * d]).chunk(2, 1)
        n = torch.tanh(part[:, 2 * d :] + r * (mixed[:, 2 * d :] + bias))
        h = torch.lerp(n, h, z)
        states.append(h)
    return torch.stack(states)


def lstm_cell(x: Tensor, weight: Tensor) -> Tensor:
    """States [T, B, width] of a long short-term memory.

    i, f, o = sigmoid(x + W h), g = tanh(x + W h), new c = f c + i g, new h = o tanh(c), with the rows of W [4 width, width]
    and the columns of ``x`` [T, B, 4 width], biases included, in the order i, f, g, o.
    """
    d = weight.shape[1]
    h = c = x[0, :, :d].new_zeros(x.shape[1], d)
    states = []
    for part in x.unbind(0):
        i, f, g, o = (part + F.linear(h, weight)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states)


_CELLS: dict[str, Callable[..., Tensor]] = {
    "tanh": partial(elman_cell, activation=torch.tanh),
    "relu": partial(elman_cell, activation=torch.relu),
    "gru": gru_cell,
    "lstm": lstm_cell,
}


def recurrent_lm(
    name: str = "recurrent_lm",
    cell: str = "gru",
    data: str = "python_chars",
    context: int | None = None,
    width: int = 32,
    layers: int = 1,
    embedding: int = 0,
    recurrent: str = "orthogonal",
    recurrent_scale: float = 1.0,
    forget_bias: float = 1.0,
    batch_size: int = 8,
    horizon: int = 500,
    device: Any = "cpu",
) -> RecurrentLM:
    """A recurrent network on a source of tokens, with the source's own context unless given; see `RecurrentLM`."""
    splits, classes, length = load_tokens(data, context, device)
    return RecurrentLM(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes, context=length,
        cell=cell, width=width, layers=layers, embedding=embedding, recurrent=recurrent, recurrent_scale=recurrent_scale,
        forget_bias=forget_bias,
    )  # fmt: skip
