"""The parts of a learned step that no feature changes: second moments of rows and columns, and the normalisers.

A step of one copy of one tensor has six phases, each of which needs all of the one before:

1. `sum_block`: sums of squared gradients along the two factored axes, in chunks;
2. `move_block`: second moments of rows and columns;
3. `relate`: rows relative to their mean;
4. accumulators, and sums of the features' squares, in chunks (generated: `metaopt_kernels.network_source`);
5. `normalise`: the inverse root mean square of each feature;
6. features, network, new parameters (generated).

Small tensors go through all phases in one program with barriers between them; of large ones each phase is a launch over all
blocks of all tensors. No sum depends on the order in which programs run.

A tensor is [outer, n1, middle, n2, inner] with the factored axes n1 and n2. A *line* is the contiguous run of n2 * inner
elements. Line sums, over n2, have an entry for each (outer, n1, middle, inner); column sums, over n1, one for each (outer,
middle, n2, inner). It is *plain* if outer, middle and inner are 1: a matrix.
"""

# mypy: disable-error-code="no-untyped-def"
# arguments are Triton's: a row of the table, a copy and a block are scalars, ``scratch`` a pointer

from __future__ import annotations

import triton
import triton.language as tl

# The columns of the table, which has one row of int64 numbers for each tensor: geometry and addresses (see
# `metaopt.perparameter.table.Row`); how many chunks there are of each kind of sum; where in a copy's scratch memory things
# lie, and how much of it a copy has; then pairs of an address and the distance between copies, for scale, keep, three kinds of
# decays, and weight and bias of each layer.
KIND, SIZE, N1, MIDDLE, N2, INNER, ROW_IS_LINE = (tl.constexpr(i) for i in range(7))
PARAM, GRAD, MOMENTUM, RMS, ROW, COL = (tl.constexpr(i) for i in range(7, 13))
NEW_PARAM, NEW_MOMENTUM, NEW_RMS, NEW_ROW, NEW_COL = (tl.constexpr(i) for i in range(13, 18))
LINE_CHUNKS, COLUMN_CHUNKS, CHUNKS = (tl.constexpr(i) for i in range(18, 21))
LINE_SUMS, COLUMN_SUMS, RELATIVE, SQUARES, INVERSE, SCRATCH = (tl.constexpr(i) for i in range(21, 27))
SCALE, KEEP, MOMENTUM_DECAY, RMS_DECAY, FACTORED_DECAY, LAYERS = (tl.constexpr(i) for i in range(27, 38, 2))

ACROSS = tl.constexpr(128)
"""Neighbours in memory that a tile of sums reads."""
ALONG = tl.constexpr(16)
ENTRIES = tl.constexpr(128)
"""Rows or columns of which one block takes care."""


@triton.jit
def of_tensor(row, column: tl.constexpr, REAL: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The address in a column of the table; ALIGNED: it is a multiple of 16 bytes."""
    address = tl.load(row + column).to(tl.pointer_type(REAL))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def size_of(row, ALIGNED: tl.constexpr):
    """How many elements the tensor has; ALIGNED: a multiple of 4."""
    size = tl.load(row + SIZE)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    return size


@triton.jit
def of_copy(row, column: tl.constexpr, copy, REAL: tl.constexpr):
    """A copy's share of the small tensor whose address and distance are in two columns."""
    return of_tensor(row, column, REAL) + copy * tl.load(row + column + 1)


@triton.jit
def clipped(g, CLIP: tl.constexpr, NAN_TO_ZERO: tl.constexpr):
    """The gradient that accumulators and features see; keeps NaN, unless the rule takes it for 0."""
    if NAN_TO_ZERO:
        g = tl.where(g == g, g, 0.0)
    if CLIP is not None:
        g = tl.where(g < -CLIP, -CLIP, tl.where(g > CLIP, CLIP, g))
    return g


@triton.jit
def at_least(x, LOW: tl.constexpr):
    """Keeps NaN."""
    return tl.maximum(x, LOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_plain(row):
    """Whether the tensor is a matrix."""
    return tl.load(row + SIZE) == tl.load(row + N1) * tl.load(row + N2)


@triton.jit
def lines_and_columns(row):
    """How many entries the two kinds of sums have, in 32 bits."""
    size = tl.load(row + SIZE)
    return (size // tl.load(row + N2)).to(tl.int32), (size // tl.load(row + N1)).to(tl.int32)


@triton.jit
def entries_at(row, base, at, PLAIN: tl.constexpr):
    """The line's and the column's entry of the elements base + at: vectorised division is of 32 bits."""
    inner, n2 = tl.load(row + INNER), tl.load(row + N2)
    line = n2 * inner
    within = (base % line).to(tl.int32) + at
    line = line.to(tl.int32)
    up = within // line
    a, b = (base // (n2 * inner)).to(tl.int32) + up, within - up * line
    if PLAIN:
        return a, b
    middle = tl.load(row + MIDDLE).to(tl.int32)
    outer = a // (tl.load(row + N1).to(tl.int32) * middle)
    inner = inner.to(tl.int32)
    return a * inner + b % inner, (outer * middle + a % middle) * line + b


# -- 1: sums of squared gradients ----------------------------------------------------------------------------------------


@triton.jit
def line_blocks(row, PLAIN: tl.constexpr):
    """Into how many blocks the lines are divided."""
    lines, _ = lines_and_columns(row)
    return tl.cdiv(lines, ALONG if PLAIN else ACROSS)


@triton.jit
def sum_block(
    row, copy, block, scratch, PLAIN: tl.constexpr, CLIP: tl.constexpr, NAN_TO_ZERO: tl.constexpr, REAL: tl.constexpr
):
    """Sum one chunk of some lines or columns; blocks of lines come first."""
    of_lines = line_blocks(row, PLAIN) * tl.load(row + LINE_CHUNKS).to(tl.int32)
    if block < of_lines:
        sum_lines(row, copy, block, scratch, PLAIN, CLIP, NAN_TO_ZERO, REAL)
    else:
        sum_columns(row, copy, block - of_lines, scratch, PLAIN, CLIP, NAN_TO_ZERO, REAL)


@triton.jit
def sum_lines(
    row, copy, block, scratch, PLAIN: tl.constexpr, CLIP: tl.constexpr, NAN_TO_ZERO: tl.constexpr, REAL: tl.constexpr
):
    """See `sum_block`."""
    lines, _ = lines_and_columns(row)
    n2, inner = tl.load(row + N2), tl.load(row + INNER)
    grad = of_tensor(row, GRAD, REAL) + copy * tl.load(row + SIZE)
    blocks = line_blocks(row, PLAIN)
    chunk, first = block // blocks, block % blocks
    each = tl.cdiv(n2, tl.load(row + LINE_CHUNKS))
    begin, end = chunk * each, tl.minimum(n2, (chunk + 1) * each)
    to = scratch + copy * tl.load(row + SCRATCH) + tl.load(row + LINE_SUMS) + chunk.to(tl.int64) * lines
    if PLAIN:  # neighbours are of one line
        entry = first * ALONG + tl.arange(0, ALONG)
        start = entry.to(tl.int64) * n2
        total = tl.zeros((ALONG, ACROSS), REAL)
        for i in range(begin, end, ACROSS):
            r = i + tl.arange(0, ACROSS)
            mask = (entry < lines)[:, None] & (r < end)[None, :]
            g = clipped(tl.load(grad + start[:, None] + r[None, :], mask=mask, other=0.0), CLIP, NAN_TO_ZERO)
            total += g * g
        tl.store(to + entry, tl.sum(total, 1), mask=entry < lines)
    else:
        entry = first * ACROSS + tl.arange(0, ACROSS)
        of_line = entry // inner.to(tl.int32)
        start = of_line.to(tl.int64) * (n2 * inner) + entry % inner.to(tl.int32)
        sum_down(grad, to, entry, start, inner, begin, end, lines, CLIP, NAN_TO_ZERO, REAL)


@triton.jit
def sum_columns(
    row, copy, block, scratch, PLAIN: tl.constexpr, CLIP: tl.constexpr, NAN_TO_ZERO: tl.constexpr, REAL: tl.constexpr
):
    """See `sum_block`."""
    _, columns = lines_and_columns(row)
    n1, middle, line = tl.load(row + N1), tl.load(row + MIDDLE), tl.load(row + N2) * tl.load(row + INNER)
    grad = of_tensor(row, GRAD, REAL) + copy * tl.load(row + SIZE)
    blocks = tl.cdiv(columns, ACROSS)
    chunk, first = block // blocks, block % blocks
    each = tl.cdiv(n1, tl.load(row + COLUMN_CHUNKS))
    begin, end = chunk * each, tl.minimum(n1, (chunk + 1) * each)
    to = scratch + copy * tl.load(row + SCRATCH) + tl.load(row + COLUMN_SUMS) + chunk.to(tl.int64) * columns
    entry = first * ACROSS + tl.arange(0, ACROSS)
    start = entry.to(tl.int64)
    if not PLAIN:
        above = entry // line.to(tl.int32)
        outer, between = above // middle.to(tl.int32), above % middle.to(tl.int32)
        start = (outer * (n1 * middle) + between) * line + entry % line.to(tl.int32)
    sum_down(grad, to, entry, start, middle * line, begin, end, columns, CLIP, NAN_TO_ZERO, REAL)


@triton.jit
def sum_down(
    grad, to, entry, start, step, begin, end, count, CLIP: tl.constexpr, NAN_TO_ZERO: tl.constexpr, REAL: tl.constexpr
):
    """Sums for neighbouring entries, of the elements from ``start`` by ``step``."""
    total = tl.zeros((ALONG, ACROSS), REAL)
    for i in range(begin, end, ALONG):
        r = i + tl.arange(0, ALONG)
        mask = (r < end)[:, None] & (entry < count)[None, :]
        g = clipped(tl.load(grad + start[None, :] + (r * step)[:, None], mask=mask, other=0.0), CLIP, NAN_TO_ZERO)
        total += g * g
    tl.store(to + entry, tl.sum(total, 0), mask=entry < count)


@triton.jit
def sum_blocks(row, PLAIN: tl.constexpr):
    """How many blocks `sum_block` has."""
    _, columns = lines_and_columns(row)
    blocks = line_blocks(row, PLAIN) * tl.load(row + LINE_CHUNKS)
    return (blocks + tl.cdiv(columns, ACROSS) * tl.load(row + COLUMN_CHUNKS)).to(tl.int32)


# -- 2: second moments ---------------------------------------------------------------------------------------------------


@triton.jit
def move_block(row, copy, block, scratch, FACTORS: tl.constexpr, REAL: tl.constexpr):
    """New second moments of some lines or columns; blocks of lines come first."""
    lines, columns = lines_and_columns(row)
    line_blocks = tl.cdiv(lines, ENTRIES)
    scratch += copy * tl.load(row + SCRATCH)
    of_line = block < line_blocks
    entry = tl.where(of_line, block, block - line_blocks) * ENTRIES + tl.arange(0, ENTRIES)
    count = tl.where(of_line, lines, columns)
    length = tl.where(of_line, tl.load(row + N2), tl.load(row + N1))
    chunks = tl.where(of_line, tl.load(row + LINE_CHUNKS), tl.load(row + COLUMN_CHUNKS)).to(tl.int32)
    sums = scratch + tl.where(of_line, tl.load(row + LINE_SUMS), tl.load(row + COLUMN_SUMS))
    is_row = of_line == (tl.load(row + ROW_IS_LINE) != 0)
    old = tl.where(is_row, tl.load(row + ROW), tl.load(row + COL)).to(tl.pointer_type(REAL))
    new = tl.where(is_row, tl.load(row + NEW_ROW), tl.load(row + NEW_COL)).to(tl.pointer_type(REAL))
    mask = entry < count
    total = tl.zeros((ALONG, ENTRIES), REAL)
    for first in range(0, chunks, ALONG):
        chunk = first + tl.arange(0, ALONG)
        at = chunk.to(tl.int64)[:, None] * count + entry[None, :]
        total += tl.load(sums + at, mask=(chunk < chunks)[:, None] & mask[None, :], other=0.0)
    mean = tl.sum(total, 0) / length.to(REAL) + 1e-30
    decays = of_copy(row, FACTORED_DECAY, copy, REAL)
    for k in tl.static_range(FACTORS):
        decay = tl.load(decays + k)
        at = (copy * FACTORS + k) * count.to(tl.int64) + entry
        tl.store(new + at, decay * tl.load(old + at, mask=mask, other=0.0) + (1 - decay) * mean, mask=mask)


@triton.jit
def move_blocks(row):
    """How many blocks `move_block` has."""
    lines, columns = lines_and_columns(row)
    return tl.cdiv(lines, ENTRIES) + tl.cdiv(columns, ENTRIES)


# -- 3: rows relative to their mean ----------------------------------------------------------------------------------------


@triton.jit
def relate(row, copy, scratch, FACTORS: tl.constexpr, PLAIN: tl.constexpr, REAL: tl.constexpr):
    """Write max(row / (mean of row + 1e-9), 1e-9) for all rows: [outer, n, inner] with the mean over n."""
    lines, columns = lines_and_columns(row)
    row_is_line = tl.load(row + ROW_IS_LINE) != 0
    count = tl.where(row_is_line, lines, columns)
    n = tl.where(row_is_line, tl.load(row + N1), tl.load(row + N2)).to(tl.int32)
    inner = tl.load(row + INNER)
    inner = tl.where(row_is_line, inner * tl.load(row + MIDDLE), inner).to(tl.int32)
    GROUPS: tl.constexpr = 1 if PLAIN else ALONG
    EACH: tl.constexpr = 1024 if PLAIN else 64
    scratch += copy * tl.load(row + SCRATCH) + tl.load(row + RELATIVE)
    moments = of_tensor(row, NEW_ROW, REAL) + copy * FACTORS * count.to(tl.int64)
    for _ in tl.static_range(FACTORS):
        for first in range(0, count // n, GROUPS):
            group = first + tl.arange(0, GROUPS)
            start = group // inner * n * inner + group % inner
            total = tl.zeros((GROUPS, EACH), REAL)
            for i in range(0, n, EACH):
                r = i + tl.arange(0, EACH)
                mask = (group < count // n)[:, None] & (r < n)[None, :]
                total += tl.load(moments + start[:, None] + (r * inner)[None, :], mask=mask, other=0.0)
            mean = tl.sum(total, 1) / n.to(REAL) + 1e-9
            for i in range(0, n, EACH):
                r = i + tl.arange(0, EACH)
                mask = (group < count // n)[:, None] & (r < n)[None, :]
                at = start[:, None] + (r * inner)[None, :]
                moment = tl.load(moments + at, mask=mask, other=0.0)
                tl.store(scratch + at, at_least(moment / mean[:, None], 1e-9), mask=mask)
        moments += count
        scratch += count


# -- 5: normalisers ------------------------------------------------------------------------------------------------------


@triton.jit
def normalise(row, copy, scratch, EPS: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr):
    """Inverse root mean squares of all features."""
    scratch += copy * tl.load(row + SCRATCH)
    squares = scratch + tl.load(row + SQUARES)
    chunks = tl.load(row + CHUNKS).to(tl.int32)
    feature = tl.arange(0, WIDTH)
    total = tl.zeros((64, WIDTH), REAL)
    for first in range(0, chunks, 64):
        chunk = first + tl.arange(0, 64)
        at = chunk[:, None] * WIDTH + feature[None, :]
        total += tl.load(squares + at, mask=(chunk < chunks)[:, None], other=0.0)
    mean = tl.sum(total, 0) / tl.load(row + SIZE).to(REAL)
    tl.store(scratch + tl.load(row + INVERSE) + feature, tl.rsqrt(mean + EPS))


# -- launches of large tensors: a program takes one block of one copy ------------------------------------------------------


@triton.jit
def item(table, items, copies, COLUMNS: tl.constexpr):
    """This program's row of the table, its copy and its block; ``items`` [n, 2] has the tensor and the block of each."""
    program = tl.program_id(0).to(tl.int64)
    at = items + program // copies * 2
    return table + tl.load(at) * COLUMNS, program % copies, tl.load(at + 1).to(tl.int32)


@triton.jit(do_not_specialize=["copies"])
def sums(
    table, items, copies, scratch,
    COLUMNS: tl.constexpr, CLIP: tl.constexpr, NAN_TO_ZERO: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Phase 1."""
    row, copy, block = item(table, items, copies, COLUMNS)
    if is_plain(row):
        sum_block(row, copy, block, scratch, True, CLIP, NAN_TO_ZERO, REAL)
    else:
        sum_block(row, copy, block, scratch, False, CLIP, NAN_TO_ZERO, REAL)


@triton.jit(do_not_specialize=["copies"])
def moments(table, items, copies, scratch, COLUMNS: tl.constexpr, FACTORS: tl.constexpr, REAL: tl.constexpr):
    """Phase 2."""
    row, copy, block = item(table, items, copies, COLUMNS)
    move_block(row, copy, block, scratch, FACTORS, REAL)


@triton.jit(do_not_specialize=["copies"])
def relations(table, items, copies, scratch, COLUMNS: tl.constexpr, FACTORS: tl.constexpr, REAL: tl.constexpr):
    """Phase 3; a block is a tensor."""
    row, copy, _ = item(table, items, copies, COLUMNS)
    if is_plain(row):
        relate(row, copy, scratch, FACTORS, True, REAL)
    else:
        relate(row, copy, scratch, FACTORS, False, REAL)


@triton.jit(do_not_specialize=["copies"])
def normalisers(
    table, items, copies, scratch, COLUMNS: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr
):
    """Phase 5; a block is a tensor."""
    row, copy, _ = item(table, items, copies, COLUMNS)
    normalise(row, copy, scratch, EPS, WIDTH, REAL)
