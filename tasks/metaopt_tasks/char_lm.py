"""Character-level language modelling of Python's own documentation: a text that every Python carries along.

The text is CPython's ``pydoc_data.topics`` (the language reference's topics that ``help()`` shows; Python Software
Foundation License), all topics in sorted order of their keys. It is about 465,000 characters in Python 3.11 and differs
a little between Python versions: compare losses only within one version (`text_version`).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split
from metaopt_tasks.cross_entropy import CrossEntropyTask, hidden_weight, output_weight

VOCABULARY_SIZE = 64
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_TRAIN_SHARE, _VALID_SHARE = 0.90, 0.05


@dataclass(frozen=True)
class TextWindows(Split):
    """Windows of ``context + 1`` tokens of one text ``tokens`` [N] int64; window i starts at token i * stride."""

    context: int = 32
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self) < 1:
            tokens = len(self.tensors["tokens"])
            raise ValueError(f"context must be less than the split's {tokens} tokens, got {self.context}")

    def __len__(self) -> int:
        return max(0, (len(self.tensors["tokens"]) - self.context - 1) // self.stride + 1)

    def take(self, indices: Tensor) -> Batch:
        """``tokens`` [..., context + 1] of the windows ``indices`` [...]."""
        tokens = self.tensors["tokens"]
        offsets = torch.arange(self.context + 1, device=tokens.device)
        return {"tokens": tokens[(indices * self.stride).unsqueeze(-1) + offsets]}


def text_version() -> str:
    """What the text depends on: ``"python-3.11"``."""
    return f"python-{sys.version_info.major}.{sys.version_info.minor}"


def vocabulary() -> str:
    """The character of each token id: U+FFFD for all rare ones, then the train part's 63 most frequent in order."""
    return _encoded_text()[0]


def pydoc_text(device: Any = "cpu", context: int = 32) -> dict[str, Split]:
    """The text, cut into the first 90 % (train), the next 5 % (valid) and the last 5 % (test).

    Training windows start at every character; valid and test windows do not share targets (their stride is
    ``context``), so a mean over all of them is the mean over the characters.
    """
    tokens = _encoded_text()[1].to(device)
    ends = [round(_TRAIN_SHARE * len(tokens)), round((_TRAIN_SHARE + _VALID_SHARE) * len(tokens))]
    strides = {"train": 1, "valid": context, "test": context}
    return {
        name: TextWindows({"tokens": part}, context, stride)
        for (name, stride), part in zip(strides.items(), tokens.tensor_split(ends), strict=True)
    }


@cache
def _encoded_text() -> tuple[str, Tensor]:
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))
    counts = Counter(text[: round(_TRAIN_SHARE * len(text))])
    frequent = sorted(counts, key=lambda char: (-counts[char], char))[: VOCABULARY_SIZE - 1]
    ids = {char: i for i, char in enumerate(frequent, start=1)}
    return _UNKNOWN + "".join(frequent), torch.tensor([ids.get(char, 0) for char in text])


@dataclass(eq=False)
class CharLM(CrossEntropyTask):
    """A decoder-only transformer with pre-norm blocks (Xiong et al. 2020, arXiv:2002.04745) and learned positions.

    Attention is written out: torch's fused one falls back to a slow per-copy loop under ``vmap``.

    Attributes:
        context: tokens that a prediction can see, at most.
        width: of the residual stream; the MLP is four times as wide.
        layers, heads: how many blocks, and attention heads in each.
        tied: use the embedding as the head.
    """

    context: int = 32
    width: int = 32
    layers: int = 1
    heads: int = 2
    tied: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")

    def init(self, generator: Generator) -> Params:
        """LeCun normal matrices (He in front of GELU, residual branches / sqrt(2 layers)), small head, 0.02 embeddings.

        The damped residual branches and the 0.02 are those of GPT-2 (Radford et al. 2019).
        """
        d, damping = self.width, 1 / math.sqrt(2 * self.layers)
        params = {
            "token.embedding": 0.02 * torch.randn(self.classes, d, generator=generator),
            "position.embedding": 0.02 * torch.randn(self.context, d, generator=generator),
        }
        for i in range(self.layers):
            params |= {
                f"block{i}.norm1.weight": torch.ones(d),
                f"block{i}.norm1.bias": torch.zeros(d),
                f"block{i}.qkv.weight": hidden_weight((3 * d, d), generator),
                f"block{i}.proj.weight": hidden_weight((d, d), generator, damping),
                f"block{i}.norm2.weight": torch.ones(d),
                f"block{i}.norm2.bias": torch.zeros(d),
                f"block{i}.fc1.weight": hidden_weight((4 * d, d), generator, math.sqrt(2)),
                f"block{i}.fc1.bias": torch.zeros(4 * d),
                f"block{i}.fc2.weight": hidden_weight((d, 4 * d), generator, damping),
                f"block{i}.fc2.bias": torch.zeros(d),
            }
        params |= {"norm.weight": torch.ones(d), "norm.bias": torch.zeros(d)}
        if not self.tied:
            params["head.weight"] = output_weight((self.classes, d), generator)
        return params

    def info(self) -> dict[str, ParamInfo]:
        """Embeddings, the head (none if tied), norms and biases by their names; other matrices are hidden."""
        roles = {"token.embedding": "embedding", "position.embedding": "embedding", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)

    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        """Tokens [B, T] int64, T at most ``context`` -> logits [B, T, classes]."""
        h = F.embedding(tokens, params["token.embedding"]) + params["position.embedding"][: tokens.shape[1]]
        for i in range(self.layers):
            p = {name: params[f"block{i}.{name}"] for name in _BLOCK}
            h = h + self._attention(p, _norm(h, p["norm1.weight"], p["norm1.bias"]))
            inner = F.linear(_norm(h, p["norm2.weight"], p["norm2.bias"]), p["fc1.weight"], p["fc1.bias"])
            h = h + F.linear(F.gelu(inner), p["fc2.weight"], p["fc2.bias"])
        head = params["token.embedding"] if self.tied else params["head.weight"]
        return F.linear(_norm(h, params["norm.weight"], params["norm.bias"]), head)

    def _attention(self, p: Params, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        qkv = F.linear(h, p["qkv.weight"]).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width / heads]
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        future = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, width), p["proj.weight"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of predicting ``tokens`` [B, context + 1] from the ones before, in nats per character."""
        tokens = batch["tokens"]
        logits = self.logits(params, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


_BLOCK = (
    "norm1.weight", "norm1.bias", "qkv.weight", "proj.weight",
    "norm2.weight", "norm2.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias",
)  # fmt: skip


def _norm(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(h, weight.shape, weight, bias)


def char_lm(
    context: int = 32,
    width: int = 32,
    layers: int = 1,
    heads: int = 2,
    batch_size: int = 8,
    horizon: int = 500,
    device: Any = "cpu",
    tied: bool = False,
) -> CharLM:
    """Predict the next character of Python's documentation: 18k parameters, 4.16 nats at the start."""
    text = pydoc_text(device, context)
    return CharLM(
        "char_lm", text["train"], text["valid"], text["test"], batch_size, horizon, classes=VOCABULARY_SIZE,
        context=context, width=width, layers=layers, heads=heads, tied=tied,
    )  # fmt: skip
