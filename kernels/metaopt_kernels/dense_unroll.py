"""Whole training runs of dense networks in one launch: a program makes all steps of one copy.

The copy's weights and the rule's slots stay in registers for all steps; what the largest networks have too much of spills
to the first-level cache, which takes hardly more than reading and writing slots in memory at every step would. A step gathers
the examples that it is told to take, runs `metaopt_kernels.dense`'s forward and backward passes, reads its coefficients and
runs the rule's statements. Between steps nothing leaves the multiprocessor but the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaopt import registry
from metaopt.dense.network import DenseNetwork
from metaopt.program.cpp import identifiers
from metaopt.program.program import Program
from metaopt.rule import Params, State
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
from metaopt_kernels.source import load_module
from metaopt_kernels.statements import IMPORTS, statements

_MOST_KEPT = 32 * 1024
"""Weights and slots, in numbers: half of a multiprocessor's registers."""


def dense_unroll(
    network: DenseNetwork,
    program: Program,
    coefficients: Mapping[str, Tensor],
    params: Params,
    state: Mapping[str, Mapping[str, Tensor]],
    inputs: Tensor,
    target: Tensor,
    indices: Tensor,
    *,
    precision: str = "tf32x3",
) -> tuple[Tensor, Params, State, Tensor] | None:
    """T inner steps of K copies of ``network`` under the rule ``program``; see `metaopt.kernels.Kernels.dense_unroll`.

    Args:
        network: layers, activation and loss.
        program: the elementwise rule; its arithmetic is in float32.
        coefficients: per name in ``program.coefficients``, float64 [K, T]; rounded to float32.
        params: float32 [K, *shape] each; not changed.
        state: the slots of each parameter, float32 [K, *shape] each; not changed.
        inputs: float32 [N, D].
        target: [N] int64 classes, or float32 [N, outputs].
        indices: int64 [K, T, B] rows of them.
        precision: of matrix products, a name in `metaopt_kernels.dense.PRECISIONS`.

    Returns:
        Losses [K, T], new parameters, new slots, and [K] whether every loss and the last parameters are finite. None for what
        `metaopt_kernels.dense.dense_gradients` does not take, for more weights and slots than registers hold, and for slots
        of other dtypes or shapes than the parameters.

    Raises:
        ValueError: a precision that is none.
    """
    copies, steps, batch = indices.shape
    shape = shape_of(network, params, inputs, target, batch)
    slots = program.tensors[2:]
    if shape is None or sum(shape.weights) * (1 + len(slots)) > _MOST_KEPT:
        return None
    names = [name for layer in network.layers for name in layer]
    if any(not _alike(params[name], state[name][slot]) for name in names for slot in slots):
        return None
    module = load_module(unroll_source(network, program, shape, precision), "dense_unroll")
    numbers = [coefficients[name].to(torch.float32) for name in program.coefficients]
    table = torch.stack(numbers, 2).contiguous() if numbers else indices.new_empty(0, dtype=torch.float32)
    new_params = {name: copied(params[name]) for name in params}
    new_state = {name: {slot: copied(state[name][slot]) for slot in slots} for name in params}
    losses = torch.empty((copies, steps), dtype=torch.float32, device=indices.device)
    finite = torch.empty(copies, dtype=torch.int32, device=indices.device)
    with torch.cuda.device_of(inputs):
        module.unroll[(copies,)](
            inputs.contiguous(), target.contiguous(), indices.contiguous(), table, losses, finite, steps,
            *(new_params[name] for name in names), *(new_state[name][slot] for slot in slots for name in names),
            num_warps=num_warps(shape, precision), **OPTIONS,
        )  # fmt: skip
    return losses, new_params, new_state, finite.bool()


def _alike(param: Tensor, slot: Tensor) -> bool:
    return slot.dtype == param.dtype and slot.shape == param.shape


def copied(value: Tensor) -> Tensor:
    """A contiguous copy, for a kernel to write to."""
    return value.clone(memory_format=torch.contiguous_format)


# -- source ------------------------------------------------------------------------------------------------------------


_UPDATE = """\
@triton.jit
def update({arguments}):
    {statements}
    return {outputs}
"""

_UNROLL = """\
@triton.jit(do_not_specialize=["steps"])
def unroll(inputs, target, indices, coefficients, losses, all_finite, steps, {pointers}):
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
        {coefficients}
        {updates}
    {checks}
    {stores}
    tl.store(all_finite + copy, finite)
"""


def unroll_source(network: DenseNetwork, program: Program, shape: Shape, precision: str) -> str:
    """Text of the module whose ``unroll`` is the kernel of `dense_unroll`."""
    names, kinds = tensors_of(shape), ["param", *(f"slot{k}" for k in range(len(program.tensors) - 2))]
    numbers = [f"c{k}" for k in range(len(program.coefficients))]
    updates = []
    for name in names:
        own = [f"{kind}_{name}" for kind in kinds]
        updates.append(f"{', '.join(own)} = update({', '.join([own[0], f'grad_{name}', *own[1:], *numbers])})")
        updates.append(f"param_{name} = tl.where(in_{name}, param_{name}, 0.0)")  # the rule may move padding
    kernel = _UNROLL.format(
        pointers=", ".join(f"to_{kind}_{name}" for kind in kinds for name in names),
        places=lines(places_source(shape)),
        loads=lines(load_source(kind, name) for kind in kinds for name in names),
        batch=shape.batch,
        batch_loads=lines(batch_source(network, shape), indent=8),
        params=", ".join(of("param", names)),
        grads=", ".join(of("grad", names)),
        coefficients=lines(
            (f"{c} = tl.load(coefficients + at * {len(numbers)} + {k})" for k, c in enumerate(numbers)), indent=8
        ),
        updates=lines(updates, indent=8),
        checks=lines(f"finite = tl.minimum(finite, dense.is_finite(param_{name}))" for name in names),
        stores=lines(store_source(kind, name) for kind in kinds for name in names),
    )
    return "\n\n".join([IMPORTS + IMPORT, network_source(network, shape, precision), _update_source(program), kernel])


def _update_source(program: Program) -> str:
    """Text of ``update(param, grad, slots..., coefficients...) -> param, slots...``, the rule on blocks."""
    names = identifiers(program)
    body, outputs = statements(program, "tl.float32")
    like = names[program.tensors[0]]
    return _UPDATE.format(
        arguments=", ".join(names[name] for name in (*program.tensors, *program.coefficients)),
        statements=lines(body),
        outputs=", ".join(f"tl.broadcast_to({output}, {like}.shape)" for output in outputs),
    )


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """AdamW on digits' network in every precision, AdamW on the largest network, and Lion."""
    digits, large = Shape((64, 32, 10), 64), Shape((128, 64, 16), 128)
    chosen = [("adamw", f"digits.{precision}", digits, precision) for precision in PRECISIONS]
    chosen += [("adamw", "large", large, PRECISIONS[0]), ("lion", "digits", digits, PRECISIONS[0])]
    types = {"indices": "*i64", "all_finite": "*i32", "steps": "i32"}
    cases = []
    for rule, name, shape, precision in chosen:
        program = registry.create("optimizer", rule).program
        kernel = load_module(unroll_source(DIGITS, program, shape, precision), "dense_unroll").unroll
        cases.append(aot_case(f"dense.unroll.{rule}.{name}", kernel, types, num_warps(shape, precision)))
    return cases
