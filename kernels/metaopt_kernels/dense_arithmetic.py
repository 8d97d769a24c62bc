"""What generated kernels of dense networks compute with: activations, losses and their slopes, on blocks of float32.

``z`` is a layer's output before its activation ``a``; a loss takes the last ``z`` [B, n], padded, and returns itself and its
slope at z, which is 0 in padding. NaN stays NaN, as in torch.
"""

# Triton compiles these functions, and finds their types itself.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# -- activations and their slopes at z, where a is the activation ------------------------------------------------------


@triton.jit
def relu(z):
    """max(z, 0)."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_slope(z, a):
    """1 where z > 0."""
    return tl.where(a > 0.0, 1.0, 0.0)


@triton.jit
def gelu(z):
    """z Phi(z), with Phi the standard normal distribution."""
    return z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z, a):
    """Phi(z) + z phi(z)."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def silu(z):
    """z sigmoid(z)."""
    return z * tl.sigmoid(z)


@triton.jit
def silu_slope(z, a):
    """s (1 + z (1 - s)), s = sigmoid(z)."""
    open_gate = tl.sigmoid(z)
    return open_gate * (1.0 + z * (1.0 - open_gate))


@triton.jit
def elu(z):
    """z, or e^z - 1 where z < 0."""
    return tl.where(z > 0.0, z, tl.exp(z) - 1.0)


@triton.jit
def elu_slope(z, a):
    """1, or e^z where z < 0."""
    return tl.where(z > 0.0, 1.0, a + 1.0)


@triton.jit
def softplus(z):
    """log(1 + e^z)."""
    return relu(z) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def softplus_slope(z, a):
    """sigmoid(z)."""
    return tl.sigmoid(z)


@triton.jit
def tanh(z):
    """2 sigmoid(2 z) - 1: Triton's language has no tanh of its own."""
    return 2.0 * tl.sigmoid(2.0 * z) - 1.0


@triton.jit
def tanh_slope(z, a):
    """1 - a^2."""
    return 1.0 - a * a


@triton.jit
def sin(z):
    """sin z."""
    return tl.sin(z)


@triton.jit
def sin_slope(z, a):
    """cos z."""
    return tl.cos(z)


@triton.jit
def linear(z):
    """z."""
    return z


@triton.jit
def linear_slope(z, a):
    """1."""
    return tl.full(z.shape, 1.0, tl.float32)


# -- losses of outputs [B, n], and their slopes ------------------------------------------------------------------------


@triton.jit
def columns_of(z):
    """Numbers of the columns [1, n]."""
    return tl.arange(0, z.shape[1])[None, :]


@triton.jit
def is_real(z, BATCH: tl.constexpr, WIDTH: tl.constexpr):
    """Which of the block's entries are no padding."""
    return (tl.arange(0, z.shape[0]) < BATCH)[:, None] & (columns_of(z) < WIDTH)


@triton.jit
def total(x):
    """Sum of a matrix."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def cross_entropy(z, label, BATCH: tl.constexpr, CLASSES: tl.constexpr, SMOOTHING: tl.constexpr):
    """Mean of log sum e^z - z_label, with ``SMOOTHING`` of the label's weight spread over all classes."""
    logits = tl.where(columns_of(z) < CLASSES, z, -float("inf"))
    shifted = logits - tl.max(logits, 1)[:, None]
    exponentials = tl.exp(shifted)
    sums = tl.sum(exponentials, 1)[:, None]
    wanted = tl.where(columns_of(z) == label[:, None], 1.0 - SMOOTHING, 0.0) + SMOOTHING / CLASSES
    real = is_real(z, BATCH, CLASSES)
    loss = total(wanted * tl.where(real, tl.log(sums) - shifted, 0.0)) / BATCH
    return loss, tl.where(real, (exponentials / sums - wanted) / BATCH, 0.0)


@triton.jit
def squared_error(z, label, BATCH: tl.constexpr, CLASSES: tl.constexpr):
    """Mean squared distance to the one-hot label less 1 / CLASSES."""
    hot = tl.where(columns_of(z) == label[:, None], 1.0, 0.0)
    error = tl.where(is_real(z, BATCH, CLASSES), z - hot + 1.0 / CLASSES, 0.0)
    return total(error * error) / BATCH, 2.0 * error / BATCH


@triton.jit
def hinge(z, label, BATCH: tl.constexpr, CLASSES: tl.constexpr):
    """Mean over examples and classes of max(0, 1 + z_j - z_label), j != label."""
    hot = columns_of(z) == label[:, None]
    own = tl.sum(tl.where(hot, z, 0.0), 1)[:, None]
    margins = tl.where(is_real(z, BATCH, CLASSES) & (hot == 0), relu(1.0 + z - own), 0.0)
    above = relu_slope(z, margins)
    slope = tl.where(hot, -tl.sum(above, 1)[:, None], above)
    return total(margins) / (BATCH * CLASSES), slope / (BATCH * CLASSES)


@triton.jit
def mse(z, target, BATCH: tl.constexpr, WIDTH: tl.constexpr):
    """Mean squared difference."""
    error = tl.where(is_real(z, BATCH, WIDTH), z - target, 0.0)
    return total(error * error) / (BATCH * WIDTH), 2.0 * error / (BATCH * WIDTH)


@triton.jit
def is_finite(x):
    """1 if all of a block is, else 0."""
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32))
