"""Kernels whose use of a multiprocessor is known: they show that `ahead_of_time` would see spills and matrix instructions."""

import triton
import triton.language as tl

from metaopt_kernels.aot import AotCase


@triton.jit
def add(out, x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)


@triton.jit
def product(out, x, y, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision="tf32"))


def aot_cases() -> list[AotCase]:
    """An addition; one with far fewer registers than numbers to keep; a matrix product."""
    pointers = {"out": "*fp32", "x": "*fp32", "y": "*fp32"}
    return [
        AotCase("add", add, pointers | {"n": "i32"}, {"BLOCK": 1024}, 4, ("out", "x", "y", "n"), {}),
        AotCase("starved", add, pointers | {"n": "i32"}, {"BLOCK": 8192}, 1, ("out", "x", "y", "n"), {"maxnreg": 32}),
        AotCase("product", product, pointers, {"SIZE": 64}, 4, ("out", "x", "y"), {}),
    ]
