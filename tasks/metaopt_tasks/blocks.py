"""Residual blocks over tokens, pre-norm (Xiong et al. 2020, arXiv:2002.04745): what transformers and mixers stack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from metaopt.rule import Params
from metaopt_tasks.layers import attention_params, hidden_weight, linear, norm, norm_params

NORMS = ("layer", "rms")
"""Of tokens; a name in `metaopt_tasks.layers.NORMS` other than ``none``."""


def two_layer_params(
    prefix: str, width: int, inner: int, generator: Generator, gain: float, damping: float, gated: bool = False
) -> Params:
    """Initial parameters of `two_layer`: normal weights of these gains, zero biases.

    Args:
        prefix: of the names.
        width: of what comes in and goes out.
        inner: width of what the activation gives.
        generator: which determines them.
        gain: of the first layer.
        damping: gain of the second, which leads back to the residual stream.
        gated: whether the activation takes twice the numbers that it gives.
    """
    columns = 2 * inner if gated else inner
    return {
        f"{prefix}fc1.weight": hidden_weight((columns, width), generator, gain),
        f"{prefix}fc1.bias": torch.zeros(columns),
        f"{prefix}fc2.weight": hidden_weight((width, inner), generator, damping),
        f"{prefix}fc2.bias": torch.zeros(width),
    }


def two_layer(params: Params, prefix: str, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Linear, activation, linear: ``x`` [..., width] -> [..., width]."""
    return linear(params, f"{prefix}fc2", activation(linear(params, f"{prefix}fc1", x)))


def block_params(
    prefix: str,
    width: int,
    inner: int,
    generator: Generator,
    gain: float,
    damping: float,
    norm_kind: str,
    gated: bool = False,
) -> Params:
    """Initial parameters of `block`; ``norm_kind`` is in `NORMS`, the others are as for `two_layer_params`."""
    return {
        **norm_params(f"{prefix}norm1", width, norm_kind),
        **attention_params(prefix, width, generator, damping),
        **norm_params(f"{prefix}norm2", width, norm_kind),
        **two_layer_params(prefix, width, inner, generator, gain, damping, gated),
    }


def block(
    params: Params,
    prefix: str,
    h: Tensor,
    attend: Callable[[Params, str, Tensor], Tensor],
    activation: Callable[[Tensor], Tensor],
    norm_kind: str,
) -> Tensor:
    """The residual stream ``h`` [B, T, width] plus attention, then plus an MLP, each of the normed stream.

    ``attend`` takes (params, prefix, x), as `metaopt_tasks.layers.attention` with all else filled in.
    """
    h = h + attend(params, prefix, norm(params, f"{prefix}norm1", h, norm_kind))
    return h + two_layer(params, prefix, norm(params, f"{prefix}norm2", h, norm_kind), activation)
