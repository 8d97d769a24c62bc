"""What the networks of the suite are made of: activations, initial weights, norms and attention, as pure functions.

Everything is vmap-safe. Weights are laid out as torch does: (out, in, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import Params
from metaopt_tasks.choices import require_choice

ACTIVATIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, math.sqrt(2)),
    "gelu": (F.gelu, math.sqrt(2)),
    "silu": (F.silu, math.sqrt(2)),
    "elu": (F.elu, math.sqrt(1.5)),
    "softplus": (F.softplus, math.sqrt(2)),
    "tanh": (torch.tanh, 1.0),
    "sin": (torch.sin, 1.0),
    "linear": (lambda x: x, 1.0),
}
"""Name -> (function, gain of the weights before it)."""

INITIALIZERS = ("normal", "uniform", "orthogonal", "sparse")
NORMS = ("none", "layer", "rms")


def hidden_weight(
    shape: tuple[int, ...], generator: Generator, gain: float = 1.0, initializer: str = "normal"
) -> Tensor:
    """Float32 weights (out, in, *kernel) whose entries have standard deviation gain / sqrt(fan_in).

    Gain sqrt(2) is He et al. 2015 (arXiv:1502.01852), for ReLU and its like; gain 1 is LeCun et al. 1998, for linear
    maps and tanh.

    Args:
        shape: of the weights.
        generator: which determines them.
        gain: of the layer.
        initializer: ``normal``; ``uniform``; ``orthogonal`` (Saxe et al. 2014, arXiv:1312.6120); or ``sparse``: 15
            inputs per unit (Martens 2010), fewer if there are fewer.
    """
    require_choice("initializer", initializer, INITIALIZERS)
    fan_in = math.prod(shape[1:])
    std = gain / math.sqrt(fan_in)
    if initializer == "uniform":
        return (2 * torch.rand(shape, generator=generator) - 1) * (math.sqrt(3) * std)
    weights = torch.randn(shape, generator=generator)
    if initializer == "orthogonal":
        # float64, so that machines agree to float32; scaled so that entries keep the standard deviation
        flat = weights.double().reshape(shape[0], fan_in)
        tall = flat if shape[0] >= fan_in else flat.T
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal().sign()
        q = q if shape[0] >= fan_in else q.T
        return (q * (std * math.sqrt(max(shape[0], fan_in)))).float().reshape(shape)
    if initializer == "sparse":
        kept = min(15, fan_in)
        rank = torch.rand(shape[0], fan_in, generator=generator).argsort(1)
        weights = weights * (rank < kept).reshape(shape) * math.sqrt(fan_in / kept)
    return weights * std


def output_weight(shape: tuple[int, int], generator: Generator) -> Tensor:
    """Float32 normal weights (classes, in) of standard deviation 1 / fan_in: the loss starts near ln C.

    As in muP (Yang and Hu 2021, arXiv:2011.14522), so logits start small at any width.
    """
    return torch.randn(shape, generator=generator) / shape[1]


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """``x`` [..., in] times ``{name}.weight`` plus ``{name}.bias``, if there is one."""
    return F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def cross_entropy(logits: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of ``logits`` [B, C] and ``label`` [B]; as `torch.nn.functional.cross_entropy`, laid out for speed.

    Under ``vmap`` on a CPU, torch's softmax over a short last dimension takes three times as long as over an inner one.
    """
    if logits.shape[-1] < 32:
        return F.cross_entropy(logits.mT[None], label[None], label_smoothing=label_smoothing)
    return F.cross_entropy(logits, label, label_smoothing=label_smoothing)


def mlp_params(
    sizes: Sequence[int], generator: Generator, gain: float = 1.0, prefix: str = "", initializer: str = "normal"
) -> Params:
    """Initial parameters of `mlp`: ``fc1`` ... for the hidden layers, ``head`` for the last; ``sizes`` with both ends."""
    params: Params = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes[:-1]), start=1):
        params[f"{prefix}fc{i}.weight"] = hidden_weight((fan_out, fan_in), generator, gain, initializer)
        params[f"{prefix}fc{i}.bias"] = torch.zeros(fan_out)
    head = output_weight((sizes[-1], sizes[-2]), generator)
    return params | {f"{prefix}head.weight": head, f"{prefix}head.bias": torch.zeros(sizes[-1])}


def mlp(params: Params, x: Tensor, activation: Callable[[Tensor], Tensor], prefix: str = "") -> Tensor:
    """A plain multi-layer perceptron: ``x`` [..., in] -> [..., out]; other parameters than `mlp_params`' are ignored."""
    i = 1
    while f"{prefix}fc{i}.weight" in params:
        x = activation(linear(params, f"{prefix}fc{i}", x))
        i += 1
    return linear(params, f"{prefix}head", x)


def norm_params(name: str, width: int, kind: str = "layer") -> Params:
    """Initial parameters of `norm`: ones and zeros."""
    require_choice("norm", kind, NORMS)
    scale = {} if kind == "none" else {f"{name}.weight": torch.ones(width)}
    return scale | ({f"{name}.bias": torch.zeros(width)} if kind == "layer" else {})


def norm(params: Params, name: str, x: Tensor, kind: str = "layer") -> Tensor:
    """Layer norm (Ba et al. 2016), RMS norm (Zhang and Sennrich 2019) or nothing over the last dimension of ``x``."""
    if kind == "none":
        return x
    weight = params[f"{name}.weight"]
    if kind == "layer":
        return F.layer_norm(x, weight.shape, weight, params[f"{name}.bias"])
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def attention_params(name: str, width: int, generator: Generator, damping: float = 1.0) -> Params:
    """Initial parameters of `attention`: LeCun normal; ``damping`` scales the projection back to the residual stream."""
    return {
        f"{name}qkv.weight": hidden_weight((3 * width, width), generator),
        f"{name}proj.weight": hidden_weight((width, width), generator, damping),
    }


def attention(
    params: Params,
    name: str,
    x: Tensor,
    heads: int,
    causal: bool = False,
    scale: float | None = None,
    rotate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Multi-head self-attention over ``x`` [B, T, width], written out.

    torch's fused attention falls back to a slow loop over the copies under ``vmap``.

    Args:
        params: with ``{name}qkv.weight`` [3 width, width] and ``{name}proj.weight`` [width, width].
        name: prefix of the parameters.
        x: [B, T, width].
        heads: divides width.
        causal: a position sees itself and those before it.
        scale: of the scores; default 1 / sqrt(width / heads).
        rotate: turns queries and keys, as one tensor [2, B, heads, T, width / heads], by their positions; default none.
    """
    batch, length, width = x.shape
    qkv = (
        F.linear(x, params[f"{name}qkv.weight"]).reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    )
    q, k, v = qkv  # each [B, heads, T, width / heads]
    if rotate is not None:
        q, k = rotate(qkv[:2])
    if scale is None:
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // heads)
    else:
        scores = q @ k.transpose(-2, -1) * scale
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    mixed = scores.softmax(-1) @ v
    return F.linear(mixed.transpose(1, 2).reshape(batch, length, width), params[f"{name}proj.weight"])
