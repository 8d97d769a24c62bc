"""What generated kernels compute with: the operations of `metaopt.program.ops` that Triton has not, or not as torch has them.

Every function takes a block or a scalar of float32 or float64 and returns its like. Float32 goes through float64 in the
functions that no processor has: Triton's float32 forms are the hardware's approximations, and rules that need them are rare.
Arguments are broadcast before they are compared, for the interpreter cannot broadcast what a comparison of scalars gives.
"""

# Triton compiles these functions, and finds their types itself.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    """x / y, correctly rounded: float32 ``/`` is an approximation."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """sqrt(x), correctly rounded: float32 ``tl.sqrt`` is an approximation."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def sign(x):
    """1, 0 or -1; 0 for NaN, as in torch."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def maximum(x, y):
    """The larger; NaN if either is, as in torch."""
    x, y = tl.broadcast(x, y)
    return tl.where((x != x) | (x > y), x, y)


@triton.jit
def minimum(x, y):
    """The smaller; NaN if either is, as in torch."""
    x, y = tl.broadcast(x, y)
    return tl.where((x != x) | (x < y), x, y)


@triton.jit
def exponential(x):
    """exp(x)."""
    return tl.exp(x.to(tl.float64)).to(x.dtype)


@triton.jit
def logarithm(x):
    """log(x)."""
    return tl.log(x.to(tl.float64)).to(x.dtype)


@triton.jit
def hyperbolic_tangent(x):
    """tanh(x), to 1e-12 of its value."""
    wide = x.to(tl.float64)
    decay = tl.exp(-2.0 * tl.abs(wide))
    size = (1.0 - decay) / (1.0 + decay)
    size = tl.where(wide < 0, -size, size)
    # near 0 the difference above cancels, and two terms of the series are exact; as a product they keep the sign of -0.0
    return tl.where(tl.abs(wide) < 1e-4, wide * (1.0 - wide * wide / 3.0), size).to(x.dtype)


@triton.jit
def sine(x):
    """sin(x)."""
    return tl.sin(x.to(tl.float64)).to(x.dtype)


@triton.jit
def cosine(x):
    """cos(x)."""
    return tl.cos(x.to(tl.float64)).to(x.dtype)


@triton.jit
def arctangent(x):
    """atan(x), to 1e-15 of its value."""
    wide = x.to(tl.float64)
    size = tl.abs(wide)
    middle, large = size > 0.4142135623730950, size > 2.414213562373095  # tan(pi / 8), tan(3 pi / 8)
    turned = tl.where(large, -1.0, size - 1.0) / tl.where(large, size, size + 1.0)  # by pi / 2, or by pi / 4
    t = tl.where(middle, turned, size)
    z = t * t
    # the minimax polynomial of atan(t) / t in t^2, within 4e-17 for t up to tan(pi / 8)
    p = 0.021135373157693246 * z - 0.04348052215716462
    p = p * z + 0.056883492268090106
    p = p * z - 0.06640233930429408
    p = p * z + 0.07689953496306857
    p = p * z - 0.09090773074808414
    p = p * z + 0.11111106180455946
    p = p * z - 0.14285714180976467
    p = p * z + 0.1999999999885511
    p = p * z - 0.3333333333332844
    p = p * z + 1.0
    quarter = tl.full((), 0.7853981633974483, tl.float64)  # by itself Triton takes it for float32
    angle = tl.where(large, 2.0 * quarter, tl.where(middle, quarter, 0.0)) + t * p
    # -0.0 stays
    return tl.where(wide < 0, -angle, tl.where(wide == 0, wide, angle)).to(x.dtype)


@triton.jit
def power(x, y):
    """x**y with the special cases of C's ``pow``."""
    base, exponent = tl.broadcast(x.to(tl.float64), y.to(tl.float64))
    size = tl.exp2(exponent * tl.log2(tl.abs(base)))
    # 0 * infinity within the line above is NaN where C says 1
    size = tl.where((tl.abs(base) == 1.0) & (exponent == exponent), 1.0, size)
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(0.5 * exponent) != 0.5 * exponent)
    negative = base.to(tl.int64, bitcast=True) < 0  # also -0.0
    signed = tl.where(negative & odd, -size, size)
    real = whole | (base >= 0) | (base == -float("inf"))
    signed = tl.where(real, signed, float("nan"))
    return tl.where((exponent == 0.0) | (base == 1.0), 1.0, signed).to(x.dtype)


@triton.jit
def added_up(sums, first, last):
    """The sum of float64 numbers ``first <= k < last``, in an order that depends on these alone."""
    total = tl.zeros((128,), tl.float64)
    for start in range(first, last, 128):
        at = start + tl.arange(0, 128)
        total += tl.load(sums + at, at < last, 0.0)
    return tl.sum(total)


@triton.jit
def nearest_bfloat16(x):
    """Float32 to bfloat16, to nearest, ties to even: the interpreter's own conversion truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    return _upper_half(x, bits + 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def stochastic_bfloat16(x, noise):
    """Float32 to one of the two bfloat16 around it, the nearer the likelier, so that its expectation is x.

    Args:
        x: float32; what bfloat16 can represent stays as it is.
        noise: uint32, uniform in [0, 2^16).
    """
    return _upper_half(x, x.to(tl.uint32, bitcast=True) + noise)


@triton.jit
def _upper_half(x, bits):
    """The bfloat16 that the upper 16 of 32 ``bits`` are; every NaN ``x`` becomes the quiet one."""
    return tl.where(x != x, 0x7FC0, bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def noise16(seed, program, BLOCK: tl.constexpr):
    """16 random bits for each element of a block, as uint32 (Philox; Salmon et al. 2011).

    Args:
        seed: of the launch.
        program: int64 number of the program: no two blocks of a launch share bits.
        BLOCK: elements, a multiple of 4.
    """
    counters = program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.randint4x(seed, counters)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    return words.to(tl.uint32, bitcast=True) & 0xFFFF
