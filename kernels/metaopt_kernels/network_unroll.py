"""Whole training runs of dense networks under a learned rule in one launch: a program makes all steps of one copy.

A step runs `metaopt_kernels.dense`'s forward and backward passes on blocks, writes the gradients to memory, and then takes all
phases of `metaopt_kernels.network_step` for one tensor after the other. Accumulators are too many for registers: what a copy
reads and writes between two steps, some 60 kB for digits' network, stays in the caches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaopt import registry
from metaopt.dense.network import DenseNetwork
from metaopt.perparameter import PerParameterRule
from metaopt.perparameter.features import Slots, slot_shapes
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.perparameter.table import Table, tabulate
from metaopt.rule import Params
from metaopt_kernels.aot import AotCase
from metaopt_kernels.dense import (
    DIGITS,
    IMPORT,
    OPTIONS,
    PRECISIONS,
    Shape,
    aot_case,
    batch_source,
    lines,
    load_source,
    network_source,
    num_warps,
    of,
    places_source,
    shape_of,
    store_source,
    tensors_of,
)
from metaopt_kernels.dense_unroll import copied
from metaopt_kernels.network_phases import SCALE
from metaopt_kernels.network_source import Kind, step_source, width
from metaopt_kernels.network_step import counts_of, kind_of, numbers_of, supports
from metaopt_kernels.source import load_module


def network_unroll(
    network: DenseNetwork,
    step: Step,
    prepare: Callable[[], Prepared],
    params: Params,
    state: Mapping[str, Slots],
    inputs: Tensor,
    target: Tensor,
    indices: Tensor,
    *,
    precision: str = "tf32x3",
) -> tuple[Tensor, Params, dict[str, Slots], Tensor] | None:
    """T inner steps of K copies of ``network`` under a learned rule; see `metaopt.kernels.Kernels.network_unroll`.

    Args:
        network: layers, activation and loss.
        step: of which rule; a ``finish`` of its own must be one that ``direction_eps`` tells.
        prepare: makes what every step needs, each tensor of it with leading dimensions T and K, of any strides, so that what
            stays the same can be expanded.
        params: float32 [K, *shape] each; not changed.
        state: the accumulators of each parameter, float32 [K, n, ...]; not changed. Other slots are not read.
        inputs: float32 [N, D].
        target: [N] int64 classes, or float32 [N, outputs].
        indices: int64 [K, T, B] rows of them.
        precision: of matrix products, those of wide learned networks too: a name in `metaopt_kernels.dense.PRECISIONS`.

    Returns:
        Losses [K, T], new parameters, new accumulators, and [K] whether every loss and the last parameters are finite. None for
        what `metaopt_kernels.dense.dense_gradients` or `metaopt_kernels.network_step.fused_step` does not take, and for rules
        with a memory or another ``finish``.

    Raises:
        ValueError: a precision that is none; a tensor that is missing, or has another shape, dtype or device than its
            parameter and features ask for.
    """
    copies, steps, batch = indices.shape
    shape = shape_of(network, params, inputs, target, batch)
    if shape is None or (step.own_finish and step.direction_eps is None):
        return None
    if not all(supports(step.features, p.shape[1:], p) for p in params.values()):
        return None
    prepared = prepare()
    if any(prepared.memory.values()):
        return None
    names = [name for layer in network.layers for name in layer]
    new_params = {name: copied(params[name]) for name in names}
    new_state = {
        name: {slot: copied(state[name][slot]) for slot in slot_shapes(step.features, p.shape[1:])}
        for name, p in new_params.items()
    }
    grads = {name: torch.empty_like(p) for name, p in new_params.items()}
    laid = _laid_out(step, prepared.map(lambda value: _by_steps(value.to(inputs))), grads, new_params, new_state)
    assert laid is not None  # everything is contiguous
    module = load_module(
        unroll_source(network, step, shape, laid.kinds, laid.table.shape[1:], precision),
        "network_unroll",
    )
    losses = torch.empty((copies, steps), dtype=torch.float32, device=inputs.device)
    finite = torch.empty(copies, dtype=torch.int32, device=inputs.device)
    with torch.cuda.device_of(inputs):
        module.unroll[(copies,)](
            inputs.contiguous(), target.contiguous(), indices.contiguous(),
            torch.from_numpy(laid.table).to(inputs.device), inputs.new_empty(laid.scratch), losses, finite, copies, steps,
            *new_params.values(), *grads.values(), *(laid.alive[0].params[name] for name in names),
            num_warps=num_warps(shape, precision), **OPTIONS,
        )  # fmt: skip
    return losses, new_params, new_state, finite.bool()


class _Layout(NamedTuple):
    """The table [T, tensors, columns] of `metaopt_kernels.network_phases` for every step, and what it leads to.

    Attributes:
        table: int64.
        kinds: of tensors, in the order of their numbers in the table.
        scratch: how many numbers of scratch memory there must be.
        alive: holds the tensors whose addresses are in the table; the first holds outputs too.
    """

    table: np.ndarray
    kinds: tuple[Kind, ...]
    scratch: int
    alive: list[Table]


def _laid_out(step: Step, prepared: Prepared, grads: Params, params: Params, state: dict[str, Slots]) -> _Layout | None:
    features, steps = step.features, len(next(iter(prepared.scale.values())))
    alive = []
    for t in range(steps)[:2]:  # small tensors of later steps lie as far from each other as those of these two
        of_step = prepared.map(operator.itemgetter(t))
        table = tabulate(step, of_step, grads, params, state, in_place=True)
        if table is None:
            return None
        alive.append(table)
    kinds = [kind_of(row, features) for row in alive[0].rows.values()]
    kinds = [kind._replace(aligned=kind.aligned and kind.matrix) for kind in kinds]  # one kind of vectors is enough
    distinct = tuple(sorted({*kinds}))
    found = []
    for table in alive:
        rows = [*table.rows.values()]
        counts = [counts_of(row.geometry, kind.form, True) for row, kind in zip(rows, kinds, strict=True)]
        copies = len(next(iter(params.values())))
        found.append(numbers_of(rows, [*map(distinct.index, kinds)], counts, copies, features, width(distinct)))
    first, scratch = found[0]
    distance = found[-1][0] - first
    distance[:, : SCALE.value] = 0  # tensors stay where they are in the first step
    return _Layout(first + np.arange(steps)[:, None, None] * distance, distinct, scratch, alive)


def _by_steps(value: Tensor) -> Tensor:
    """``value`` [T, K, ...] with every copy's numbers [...] of one step in a row."""
    return value if value[0, 0].is_contiguous() else value.contiguous()


# -- source ------------------------------------------------------------------------------------------------------------

_UNROLL = """\
@triton.jit(do_not_specialize=["copies", "steps"])
def unroll(inputs, target, indices, table, scratch, losses, all_finite, copies, steps, {pointers}):
    {places}
    {loads}
    finite = 1
    for step in range(steps):
        at = copy * steps + step
        rows = tl.load(indices + at * {batch} + at_batch, mask=in_batch, other=0)
        {batch_loads}
        loss, {grads} = loss_and_gradients(x, y, {params})
        tl.store(losses + at, loss)
        finite = tl.where(tl.abs(loss) < float("inf"), finite, 0)
        {stores}
        tl.debug_barrier()
        for tensor in range({tensors}):
            row = table + (step * {tensors} + tensor) * {columns}
            kind = tl.load(row + KIND)
            {cases}
        tl.debug_barrier()
        row = table + step * {tensors} * {columns}
        {moved}
    {checks}
    tl.store(all_finite + copy, finite)
"""


def unroll_source(
    network: DenseNetwork,
    step: Step,
    shape: Shape,
    kinds: tuple[Kind, ...],
    table: tuple[int, int],
    precision: str,
) -> str:
    """Text of the module whose ``unroll`` is the kernel of `network_unroll`.

    Args:
        network: what is trained.
        step: with which rule.
        shape: of the network and its batches.
        kinds: of tensors, in the order of their numbers in the table.
        table: its rows and columns in one step.
        precision: of matrix products.
    """
    names, (tensors, columns) = tensors_of(shape), table
    loads = [load_source("param", name) for name in names]
    cases = []
    for number, _ in enumerate(kinds):
        cases += [f"{'elif' if number else 'if'} kind == {number}:", f"    step_{number}(row, copy, scratch)"]
    moved = _finish(step, shape, kinds[0].sizes[-1], columns) if step.own_finish else loads
    kernel = _UNROLL.format(
        pointers=", ".join(f"to_{kind}_{name}" for kind in ("param", "grad", "out") for name in names),
        places=lines(places_source(shape)),
        loads=lines(loads),
        batch=shape.batch,
        batch_loads=lines(batch_source(network, shape), indent=8),
        params=", ".join(of("param", names)),
        grads=", ".join(of("grad", names)),
        stores=lines((store_source("grad", name) for name in names), indent=8),
        tensors=tensors,
        columns=columns,
        cases=lines(cases, indent=12),
        moved=lines(moved, indent=8),
        checks=lines(f"finite = tl.minimum(finite, dense.is_finite(param_{name}))" for name in names),
    )
    learned = step_source(step, kinds, "float32", precision, columns)
    return "\n\n".join([learned + IMPORT, network_source(network, shape, precision), kernel])


def _finish(step: Step, shape: Shape, outputs: int, columns: int) -> list[str]:
    """New parameters, in registers and in memory, from directions [K, outputs, *shape] that are to be normalised."""
    found = []
    sizes = [size for fan_in, fan_out in pairwise(shape.widths) for size in (fan_in * fan_out, fan_out)]
    for name, size in zip(tensors_of(shape), sizes, strict=True):
        d, s = (
            f"tl.load(to_out_{name} + copy * {(outputs - 1) * size} + {k * size} + at_{name}, mask=in_{name}, other=0.0)"
            for k in range(2)
        )
        found += [
            f"u = {d}" if step.magnitude is None else f"u = {d} * tl.exp({step.magnitude} * {s})",
            f"u *= tl.rsqrt(tl.sum(u * u) / {size} + {step.direction_eps})",
            "scale, keep = tl.load(of_copy(row, SCALE, copy, REAL)), tl.load(of_copy(row, KEEP, copy, REAL))",
            f"param_{name} = keep * param_{name} - scale * u",
            store_source("param", name),
            f"row += {columns}",
        ]
    return found


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """Digits' network under learned rules."""
    shape, precision = Shape((64, 32, 10), 64), PRECISIONS[0]
    types = {"indices": "*i64", "table": "*i64", "all_finite": "*i32", "copies": "i32", "steps": "i32"}
    cases = []
    chosen = [
        ("adafac_4", "small_fc_lopt", 4),
        ("adafac_32", "small_fc_lopt", 32),
        ("celo2_base", "celo2_base", 8),
    ]
    for name, rule, hidden in chosen:
        made: PerParameterRule = registry.create("learned_optimizer", rule, hidden=hidden)
        features, outputs = made.features, 1 if made.has_own_finish else 2
        kinds = tuple(
            Kind(form, matrix, (features.count((2,) * (1 + matrix)), hidden, hidden, outputs), matrix)
            for form, matrix in (("flat", False), ("plain", True))
        )
        source = unroll_source(DIGITS, made.kernel_step, shape, kinds, (4, 49), precision)
        kernel = load_module(source, "network_unroll").unroll
        cases.append(aot_case(f"network_unroll.digits.{name}", kernel, types, num_warps(shape, precision)))
    return cases
