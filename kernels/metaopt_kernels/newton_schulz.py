"""Newton-Schulz iterations of stacked small matrices in one launch: a program keeps one matrix on the chip throughout.

`metaopt.matrix.newton_schulz` is the reference. Here everything is float32, also for matrices stored in bfloat16, which are
rounded once, at the end. With ``ieee`` products the error against float64 is that of float32 torch, about 1e-6 after the
usual five iterations; factors of ``tf32`` products have 10 bits of mantissa.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaopt.matrix import QUINTIC
from metaopt_kernels.aot import AotCase
from metaopt_kernels.arithmetic import nearest_bfloat16

WIDEST = {"ieee": 64, "tf32": 128}
"""The longest side for each precision of the products: beyond, a program's blocks leave the registers."""

_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@triton.jit
def orthogonalise(  # type: ignore[no-untyped-def]
    matrices, eps, out, rows, columns, matrix_stride, row_stride, column_stride, out_row_stride, out_column_stride,
    STEPS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One matrix with no more rows than columns, padded with zeros, which every product leaves zero."""
    matrix = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    inside = (row < rows) & (column < columns)
    at = matrices + matrix * matrix_stride + row * row_stride + column * column_stride
    x = tl.load(at, inside, 0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0))
    x = tl.div_rn(x, tl.zeros_like(x) + (norm + tl.load(eps + matrix)))
    for _ in range(STEPS):
        gram = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        polynomial = B * gram + tl.dot(C * gram, gram, input_precision=PRECISION)
        x = A * x + tl.dot(polynomial, x, input_precision=PRECISION)
    to = out + matrix * rows * columns + row * out_row_stride + column * out_column_stride
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(to, nearest_bfloat16(x), inside)
    else:
        tl.store(to, x, inside)


def newton_schulz(matrices: Tensor, steps: int, eps: Tensor | float, precision: str | None = None) -> Tensor | None:
    """`metaopt.matrix.newton_schulz` of matrices that fit on the chip; nothing is recorded for autograd.

    Args:
        matrices: [..., m, n] float32 or bfloat16, of any strides.
        steps: iterations.
        eps: added to the Frobenius norm; broadcasts against [..., 1, 1].
        precision: a key of `WIDEST`; None: what ``torch.set_float32_matmul_precision`` allows, as it is "ieee".

    Returns:
        [..., m, n] in the dtype of ``matrices``; None for other dtypes, a longer side than `WIDEST`, and no elements.

    Raises:
        ValueError: a precision that is none.
    """
    if precision is None:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if precision not in WIDEST:
        raise ValueError(f"precision must be one of {', '.join(WIDEST)}, got {precision!r}")
    *stack, m, n = matrices.shape
    if max(m, n) > WIDEST[precision] or matrices.dtype not in (torch.float32, torch.bfloat16) or not matrices.numel():
        return None
    count = math.prod(stack)
    x = matrices.reshape(count, m, n)
    out = torch.empty((count, m, n), dtype=x.dtype, device=x.device)
    small = eps if isinstance(eps, Tensor) else torch.full((), eps, device=x.device)
    small = small.to(torch.float32).broadcast_to((*stack, 1, 1)).contiguous()
    sides = [(m, x.stride(1), out.stride(1)), (n, x.stride(2), out.stride(2))]
    (rows, *row_strides), (columns, *column_strides) = sorted(sides, key=lambda side: side[0])  # the short side first
    with torch.cuda.device_of(x):
        orthogonalise[(count,)](
            x, small, out, rows, columns, x.stride(0), row_strides[0], column_strides[0], row_strides[1],
            column_strides[1], steps, *QUINTIC, **_constants(rows, columns, precision),
            num_warps=_warps(rows, columns), **_OPTIONS,
        )  # fmt: skip
    return out.reshape(matrices.shape)


def _constants(rows: int, columns: int, precision: str) -> dict[str, Any]:
    """16 is the least side that ``tl.dot`` multiplies."""
    sides = {"ROWS": max(16, triton.next_power_of_2(rows)), "COLUMNS": max(16, triton.next_power_of_2(columns))}
    return {**sides, "PRECISION": precision}


def _warps(rows: int, columns: int) -> int:
    return 4 if rows * columns < 64 * 64 else 8


def aot_cases() -> list[AotCase]:
    """A hidden layer of the small tasks, and the widest there is."""
    strides = ["matrix_stride", "row_stride", "column_stride", "out_row_stride", "out_column_stride"]
    signature = {"matrices": "*fp32", "eps": "*fp32", "out": "*fp32"} | dict.fromkeys(
        ["rows", "columns", *strides], "i32"
    )
    cases = []
    for rows, columns, precision in ((32, 64, "ieee"), (64, 64, "ieee"), (64, 64, "tf32"), (128, 128, "tf32")):
        constants = {"STEPS": 5} | dict(zip("ABC", QUINTIC, strict=True)) | _constants(rows, columns, precision)
        name = f"newton_schulz.{rows}x{columns}.{precision}"
        pointers = ("matrices", "eps", "out")
        cases.append(AotCase(name, orthogonalise, signature, constants, _warps(rows, columns), pointers, _OPTIONS))
    return cases
