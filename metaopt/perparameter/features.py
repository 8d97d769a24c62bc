"""What a per-parameter network sees: accumulators of the gradient, and features made of them. Plain torch, pure, vmap-safe.

With g the gradient, p the parameter and decays beta (one k per decay; accumulators start at 0):

- momenta ``m_k <- beta_k m_k + (1 - beta_k) g``;
- second moments ``v_k <- beta_k v_k + (1 - beta_k) g^2``, and ``r_k = (v_k + rms_eps)^(-1/2)``;
- factored second moments of matrices (Adafactor): with d0 the largest axis and d1 the second largest,
  ``row_k <- beta_k row_k + (1 - beta_k) mean_d0(g^2 + 1e-30)``, ``col_k`` likewise with the mean over d1, and the factor
  ``s_k = (max(row_k / (mean_d1 row_k + 1e-9), 1e-9) max(col_k, 1e-9))^(-1/2)``;
- vectors and scalars keep the whole ``diag_k <- beta_k diag_k + (1 - beta_k) (g^2 + 1e-30)`` instead, which then stands for
  row_k and col_k, with ``s_k = (max(diag_k + 1e-9, 1e-9))^(-1/2)``.

A block of features is one of these for every k; see `BLOCKS`. Each feature is divided by its root mean square over the
tensor. Metz et al. 2022 (https://arxiv.org/abs/2203.11860), appendix; VeLO (https://arxiv.org/abs/2211.09760), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

ACCUMULATORS = ("momentum", "rms", "row", "col", "diag")
Slots = dict[str, Tensor]
"""The accumulators of one parameter: ``momentum`` and ``rms`` [n, *shape], ``row`` and ``col`` or ``diag`` [n, ...]."""

Decays = Mapping[str, Tensor]
"""``momentum``, ``rms`` and ``factored``: one number in [0, 1] per accumulator, each [n]."""

BLOCKS: dict[str, str] = {
    "g": "", "clipped_g": "", "p": "", "log_abs_p": "",
    "m": "momentum", "v": "rms", "m_r": "momentum", "r": "rms", "g_r": "rms",
    "factored_g": "factored", "row": "factored", "col": "factored",
    "rsqrt_row": "factored", "rsqrt_col": "factored", "factored_m": "factored",
}  # fmt: skip
"""Block -> the decays of which it has one feature each ("" = one feature): g; g clipped to +-0.1; p; log(|p| + 1e-8); m;
v; m r; r; g r; g s; row; col; (row + 1e-8)^(-1/2); (col + 1e-8)^(-1/2); m s, which for vectors is
m (diag + diagonal_eps)^(-1/2)."""


@dataclass(frozen=True)
class Features:
    """The features of one learned rule, shared by all of its executions.

    Attributes:
        blocks: names in `BLOCKS`, in the order of the first layer's inputs.
        momentum, rms, factored: how many decays of each kind.
        clip: gradients are clamped to +- this first.
        nan_to_zero: entries of gradients that are not a number count as 0.
        rms_eps, diagonal_eps, norm_eps: see the module; ``norm_eps`` is added to the mean square of a feature.
        norm: over what a feature's mean square is taken: the whole ``tensor``, or each ``matrix`` (outputs x inputs) of it.
        layout: where the output and input axes are: ``torch`` (out, in, *kernel), or ``jax`` (*kernel, in, out).
        vector_blocks: vectors and scalars have only so many of the blocks; None = all.
        bias_correction: divide accumulators by 1 - beta^t, except inside ``factored_g``.

    Raises:
        ValueError: a block, norm or layout that is none, or a block without accumulators.
    """

    blocks: tuple[str, ...]
    momentum: int
    rms: int
    factored: int
    clip: float = math.inf
    nan_to_zero: bool = False
    rms_eps: float = 1e-6
    diagonal_eps: float = 1e-6
    norm_eps: float = 1e-5
    norm: str = "tensor"
    layout: str = "torch"
    vector_blocks: int | None = None
    bias_correction: bool = False

    def __post_init__(self) -> None:
        for block in self.blocks:
            if block not in BLOCKS:
                raise ValueError(f"a block must be one of {', '.join(BLOCKS)}, got {block!r}")
            if not self.planes(block):
                raise ValueError(
                    f"block {block!r} is made of {BLOCKS[block]} accumulators; set {BLOCKS[block]} to at least 1"
                )
        for name, allowed in (("norm", ("tensor", "matrix")), ("layout", ("torch", "jax"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def blocks_of(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The blocks that a parameter of this shape has."""
        return self.blocks[: self.vector_blocks] if len(shape) < 2 else self.blocks

    def planes(self, block: str) -> int:
        """How many features a block holds."""
        kind = BLOCKS[block]
        return getattr(self, kind) if kind else 1

    def count(self, shape: tuple[int, ...]) -> int:
        """How many features a parameter of this shape has."""
        return sum(map(self.planes, self.blocks_of(shape)))


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


def norm_axes(features: Features, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes over which a feature's mean square is taken."""
    if features.norm == "tensor" or len(shape) < 3:
        return tuple(range(len(shape)))
    return (0, 1) if features.layout == "torch" else (len(shape) - 2, len(shape) - 1)


def clip(features: Features, grad: Tensor) -> Tensor:
    """The gradient that accumulators and features see."""
    grad = torch.where(grad.isnan(), 0.0, grad) if features.nan_to_zero else grad
    return grad.clamp(-features.clip, features.clip) if math.isfinite(features.clip) else grad


def zero_slots(features: Features, param: Tensor) -> Slots:
    """Accumulators at the start, in ``param``'s dtype."""
    zeros = torch.zeros_like(param, memory_format=torch.contiguous_format)

    def stacked(n: int, like: Tensor) -> Tensor:
        return like.expand(n, *like.shape).clone()

    slots = {"momentum": stacked(features.momentum, zeros), "rms": stacked(features.rms, zeros)}
    axes = factored_axes(tuple(param.shape), features.layout)
    if not features.factored:
        pass
    elif axes is None:
        slots["diag"] = stacked(features.factored, zeros)
    else:
        slots["row"], slots["col"] = (stacked(features.factored, zeros.sum(axis)) for axis in (axes[1], axes[0]))
    return {slot: value for slot, value in slots.items() if len(value)}


@lru_cache(maxsize=1024)
def slot_shapes(features: Features, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the accumulators of a parameter of this shape."""
    slots = zero_slots(features, torch.empty(shape, device="meta"))
    return {slot: tuple(value.shape) for slot, value in slots.items()}


def accumulate(features: Features, decays: Decays, grad: Tensor, slots: Slots) -> Slots:
    """New accumulators after ``grad`` (clipped already, if at all)."""
    square = grad * grad
    new: Slots = {}
    if features.momentum:
        new["momentum"] = blend(slots["momentum"], grad, decays["momentum"])
    if features.rms:
        new["rms"] = blend(slots["rms"], square, decays["rms"])
    if features.factored:
        axes = factored_axes(tuple(grad.shape), features.layout)
        square = square + 1e-30
        if axes is None:
            new["diag"] = blend(slots["diag"], square, decays["factored"])
        else:
            new["row"] = blend(slots["row"], _mean(square, axes[1]), decays["factored"])
            new["col"] = blend(slots["col"], _mean(square, axes[0]), decays["factored"])
    return new


def inputs(
    features: Features, param: Tensor, grad: Tensor, slots: Slots, decays: Decays, t: Tensor | None = None
) -> Tensor:
    """The features of each parameter [F, *shape], normalised; ``slots`` are the updated ones, t (from 1) counts updates."""
    shape = tuple(param.shape)
    axes = factored_axes(shape, features.layout)
    used = corrected(slots, decays, t) if features.bias_correction and t is not None else slots
    found = blocks(features, shape, param, grad, used, factors(features, slots, used, axes))
    return normalised(found, norm_axes(features, shape), features.norm_eps)


def normalised(planes: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Each of ``planes`` [F, *shape] divided by the root of its mean square over ``axes`` (of shape) plus eps."""
    square = planes * planes
    if axes:
        square = square.mean(tuple(axis + 1 for axis in axes), keepdim=True)
    return planes * torch.rsqrt(eps + square)


def corrected(slots: Slots, decays: Decays, t: Tensor) -> Slots:
    """Accumulators divided by 1 - beta^t."""
    kinds = {"momentum": "momentum", "rms": "rms", "row": "factored", "col": "factored", "diag": "factored"}
    found: Slots = {}
    for slot, value in slots.items():
        divisor = 1 - decays[kinds[slot]].to(value.dtype) ** t.to(value.dtype)
        found[slot] = value / _planewise(divisor, value)
    return found


class Factors(NamedTuple):
    """What factored blocks multiply g and m by: tensors that broadcast to [n, *shape], to be multiplied one by one."""

    of_grad: tuple[Tensor, ...]
    of_momentum: tuple[Tensor, ...]


def factors(features: Features, slots: Slots, used: Slots, axes: tuple[int, int] | None) -> Factors:
    """The factors of a parameter; ``slots`` are its accumulators, ``used`` those after bias correction, if any."""
    if not features.factored:
        return Factors((), ())
    if axes is not None:
        of_grad = _row_and_column(slots, axes)
        return Factors(of_grad, of_grad if used is slots else _row_and_column(used, axes))
    diag = used["diag"] + features.diagonal_eps
    # where gradients were zero, the derivative of the root is infinite
    of_momentum = torch.rsqrt(torch.where(diag > 1e-24, diag, diag.detach()))
    return Factors((torch.rsqrt(torch.clamp(slots["diag"] + 1e-9, min=1e-9)),), (of_momentum,))


def _row_and_column(slots: Slots, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The two factors of s_k."""
    d1, d0 = axes
    within_row = d1 - (d1 > d0) + 1  # where d1 is in ``row`` [n, shape without d0]
    relative = slots["row"] / (slots["row"].mean(within_row, keepdim=True) + 1e-9)
    row_factor = torch.rsqrt(torch.clamp(relative, min=1e-9)).unsqueeze(d0 + 1)
    return row_factor, torch.rsqrt(torch.clamp(slots["col"], min=1e-9)).unsqueeze(d1 + 1)


def blocks(
    features: Features, shape: tuple[int, ...], param: Tensor, grad: Tensor, slots: Slots, factors: Factors
) -> Tensor:
    """The features before normalisation [F, *part]; all tensors may be the same part of a parameter of ``shape``."""
    made = _Blocks(features, factored_axes(shape, features.layout), param, grad, slots, factors)
    return torch.cat([made.block(name) for name in features.blocks_of(shape)])


class _Blocks:
    """The blocks of one parameter or of a part of it, each [n, *part]; axes are those of the whole."""

    def __init__(
        self,
        features: Features,
        axes: tuple[int, int] | None,
        param: Tensor,
        grad: Tensor,
        slots: Slots,
        factors: Factors,
    ) -> None:
        self.features, self.axes = features, axes
        self.p, self.g, self.slots, self.factors = param, grad, slots, factors

    def block(self, name: str) -> Tensor:
        found: Callable[[], Tensor] = getattr(self, f"_{name}")
        value = found()
        return value.expand(value.shape[0], *self.p.shape)

    def _g(self) -> Tensor:
        return self.g.unsqueeze(0)

    def _clipped_g(self) -> Tensor:
        return self.g.clamp(-0.1, 0.1).unsqueeze(0)

    def _p(self) -> Tensor:
        return self.p.unsqueeze(0)

    def _log_abs_p(self) -> Tensor:
        return (self.p.abs() + 1e-8).log().unsqueeze(0)

    def _m(self) -> Tensor:
        return self.slots["momentum"]

    def _v(self) -> Tensor:
        return self.slots["rms"]

    def _r(self) -> Tensor:
        return torch.rsqrt(self.slots["rms"] + self.features.rms_eps)

    def _m_r(self) -> Tensor:
        return self._m() * self._r()

    def _g_r(self) -> Tensor:
        return self.g * self._r()

    def _row(self) -> Tensor:
        return self.slots["diag"] if self.axes is None else self.slots["row"].unsqueeze(self.axes[1] + 1)

    def _col(self) -> Tensor:
        return self.slots["diag"] if self.axes is None else self.slots["col"].unsqueeze(self.axes[0] + 1)

    def _rsqrt_row(self) -> Tensor:
        return torch.rsqrt(self._row() + 1e-8)

    def _rsqrt_col(self) -> Tensor:
        return torch.rsqrt(self._col() + 1e-8)

    def _factored_g(self) -> Tensor:
        return self.g * reduce(torch.mul, self.factors.of_grad)

    def _factored_m(self) -> Tensor:
        return self._m() * reduce(torch.mul, self.factors.of_momentum)


def blend(old: Tensor, new: Tensor, decay: Tensor) -> Tensor:
    """decay old + (1 - decay) new, one decay per leading plane of ``old``."""
    decay = _planewise(decay.to(old.dtype), old)
    return decay * old + (1 - decay) * new


def _mean(values: Tensor, axis: int) -> Tensor:
    """0 over an empty axis: a NaN there would reach the meta-gradients of decays."""
    return values.sum(axis) / max(values.shape[axis], 1)


def _planewise(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.dim() - 1))
