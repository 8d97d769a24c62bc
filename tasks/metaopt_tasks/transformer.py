"""Decoder-only transformer language models on text and on procedural sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt_tasks.blocks import NORMS, block, block_params
from metaopt_tasks.choices import require_choice
from metaopt_tasks.language import LanguageModel, load_tokens
from metaopt_tasks.layers import (
    ACTIVATIONS,
    attention,
    norm,
    norm_params,
    output_weight,
)

POSITIONS = ("learned", "rotary", "none")
MLPS = ("gelu", "relu", "swiglu")
MUP_HEAD_WIDTH = 16
"""Where muP's attention scale meets the standard one."""


@dataclass(eq=False)
class TransformerLM(LanguageModel):
    """Token embedding (and positions) -> pre-norm blocks (`metaopt_tasks.blocks.block`) -> norm -> head.

    Attributes:
        width: of the residual stream; the MLP is four times as wide.
        layers, heads: how many blocks, and attention heads in each.
        tied: use the embedding as the head.
        positions: ``learned``; ``rotary`` (Su et al. 2021, arXiv:2104.09864); or ``none``: the causal mask alone tells
            them (Kazemnejad et al. 2023, arXiv:2305.19466).
        mlp: ``gelu``, ``relu``, or ``swiglu`` (Shazeer 2020, arXiv:2002.05202; 8/3 as wide, so as many parameters).
        norm: ``layer`` or ``rms``.
        mup: scale attention by 1 / d instead of 1 / sqrt(d), for heads d wide, so that one learning rate fits all widths
            (Yang et al. 2022, arXiv:2203.03466, definition 4.1); both agree at `MUP_HEAD_WIDTH`.
    """

    width: int = 32
    layers: int = 1
    heads: int = 2
    tied: bool = False
    positions: str = "learned"
    mlp: str = "gelu"
    norm: str = "layer"
    mup: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        require_choice("positions", self.positions, POSITIONS)
        require_choice("mlp", self.mlp, MLPS)
        require_choice("norm", self.norm, NORMS)
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"width / heads must be even for rotary positions, got {self.width} / {self.heads}")
        if self.mup and self.tied:
            raise ValueError("tied must be False with mup: embedding and head need learning rates of their own")

    def init(self, generator: Generator) -> Params:
        """LeCun normal matrices (He in front of activations, residual branches / sqrt(2 layers)), small head, 0.02 embeddings.

        The damped residual branches and the 0.02 are those of GPT-2 (Radford et al. 2019).
        """
        d, damping = self.width, 1 / math.sqrt(2 * self.layers)
        gated = self.mlp == "swiglu"
        inner = 8 * d // 3 if gated else 4 * d
        params = {"token.embedding": 0.02 * torch.randn(self.classes, d, generator=generator)}
        if self.positions == "learned":
            params["position.embedding"] = 0.02 * torch.randn(self.context, d, generator=generator)
        for i in range(self.layers):
            params |= block_params(f"block{i}.", d, inner, generator, math.sqrt(2), damping, self.norm, gated)
        params |= norm_params("norm", d, self.norm)
        if not self.tied:
            params["head.weight"] = output_weight((self.classes, d), generator)
        return params

    def info(self) -> dict[str, ParamInfo]:
        """Embeddings, the head (none if tied), norms and biases by their names; other matrices are hidden."""
        roles = {"token.embedding": "embedding", "position.embedding": "embedding", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)

    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        """Tokens [B, T] int64, T at most ``context`` -> logits [B, T, classes]."""
        h = F.embedding(tokens, params["token.embedding"])
        if self.positions == "learned":
            h = h + params["position.embedding"][: tokens.shape[1]]
        attend = partial(
            attention,
            heads=self.heads,
            causal=True,
            scale=math.sqrt(MUP_HEAD_WIDTH) * self.heads / self.width if self.mup else None,
            rotate=rotary(tokens.shape[1], self.width // self.heads, h) if self.positions == "rotary" else None,
        )
        for i in range(self.layers):
            h = block(params, f"block{i}.", h, attend, self._activate, self.norm)
        head = params["token.embedding"] if self.tied else params["head.weight"]
        return F.linear(norm(params, "norm", h, self.norm), head)

    def _activate(self, h: Tensor) -> Tensor:
        if self.mlp != "swiglu":
            return ACTIVATIONS[self.mlp][0](h)
        gate, value = h.chunk(2, -1)
        return F.silu(gate) * value


def rotary(length: int, width: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that turns [..., length, width] by position, in the dtype and on the device of ``like``.

    Features i and i + width / 2 of position t are a plane, turned by t / 10000^(2i / width). Products of turned queries and
    keys then depend on the difference of their positions only (Su et al. 2021, equation 34).
    """
    position = torch.arange(length, dtype=like.dtype, device=like.device)
    rate = 10000.0 ** (-torch.arange(width // 2, dtype=like.dtype, device=like.device) / (width // 2))
    angle = position[:, None] * rate
    cos, sin = angle.cos(), angle.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    return turned


def transformer_lm(
    name: str = "transformer_lm",
    data: str = "python_source",
    context: int | None = None,
    width: int = 32,
    layers: int = 1,
    heads: int = 2,
    tied: bool = False,
    positions: str = "learned",
    mlp: str = "gelu",
    norm: str = "layer",
    mup: bool = False,
    batch_size: int = 8,
    horizon: int = 500,
    device: Any = "cpu",
) -> TransformerLM:
    """A transformer on a source of tokens, with the source's own context unless given; see `TransformerLM`."""
    splits, classes, length = load_tokens(data, context, device)
    return TransformerLM(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes, context=length,
        width=width, layers=layers, heads=heads, tied=tied, positions=positions, mlp=mlp, norm=norm, mup=mup,
    )  # fmt: skip
