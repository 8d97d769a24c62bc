"""Dense networks in C++: losses and gradients of K copies, and whole training runs of them.

``dense.cpp`` holds the arithmetic. Sizes, activation and loss are arguments, so one build serves all networks; the update
of a training run is the C++ step that `metaopt.program.cpp` makes of its rule.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from metaopt.dense.network import ACTIVATIONS, LOSSES, DenseNetwork
from metaopt.program.build import CPP_TYPES, PRELUDE, compiler, load_library
from metaopt.program.cpp import compile_cpp
from metaopt.program.program import Program
from metaopt.rule import Params, State

_ARITHMETIC = Path(__file__).with_name("dense.cpp")
_MOST_FLOPS = 1e8
"""Of one copy's loss and gradients. Larger ones leave the cache, and torch's products can use several threads for one."""


class _Network(ctypes.Structure):
    """``struct Network`` of dense.cpp."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("loss", ctypes.c_int64),
        ("activations", ctypes.POINTER(ctypes.c_int64)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("smoothing", ctypes.c_double),
    )


def dense_gradients(
    network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor
) -> tuple[Tensor, Params] | None:
    """Losses [K] and gradients of K copies, each on a batch of its own, in float32 or float64.

    Args:
        network: layers, activation and loss.
        params: [K, *shape] each.
        inputs: [K, B, D].
        target: [K, B] int64 classes, or for ``mse`` [K, B, outputs].

    Returns:
        None where torch has to do it: no compiler, another device or dtype, copies that each keep a core busy, or tensors
        that do not fit the network.

    Raises:
        IndexError: a label that is no class.
        MemoryError: out of memory.
    """
    copies, batch = inputs.shape[:2]
    widths = network.widths(params, inputs, target)
    library = _library([*params.values(), inputs, target])
    if widths is None or library is None or len(next(iter(params.values()))) != copies or _large(widths, batch):
        return None
    layers = _by_layer(network, params)
    grads = [torch.empty_like(p) for p in layers]
    inputs, target = inputs.contiguous(), target.contiguous()
    losses = inputs.new_empty(copies)
    outcome = library.gradients(
        ctypes.byref(_described(network, widths, batch)), copies, _addresses(layers), inputs.data_ptr(),
        *_of_target(target), losses.data_ptr(), _addresses(grads), torch.get_num_threads(),
    )  # fmt: skip
    _raise_for(outcome, widths, len(inputs))
    return losses, _by_name(network, params, grads)


def dense_unroll(
    network: DenseNetwork,
    program: Program,
    coefficients: Mapping[str, Tensor],
    params: Params,
    state: Mapping[str, Mapping[str, Tensor]],
    inputs: Tensor,
    target: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Params, State, Tensor] | None:
    """T inner steps of K copies, in float32 or float64: see `metaopt.kernels.Kernels.dense_unroll`.

    Returns:
        None where torch has to do it: as `dense_gradients`.

    Raises:
        IndexError: an index that is no example, or a label that is no class.
        MemoryError: out of memory.
    """
    copies, steps, batch = indices.shape
    widths = network.widths(params, inputs, target)
    slots = {slot: {name: state[name][slot] for name in params} for slot in program.tensors[2:]}
    tensors = [*params.values(), *(value for own in slots.values() for value in own.values())]
    library = _library([*tensors, inputs, target, indices])
    if widths is None or library is None or len(tensors[0]) != copies or _large(widths, batch):
        return None
    if any(
        own[name].shape != p.shape or own[name].dtype != p.dtype for own in slots.values() for name, p in params.items()
    ):
        return None
    step = compile_cpp(program, *(inputs.dtype,) * 3)
    if step is None:
        return None
    layers = _by_layer(network, params)
    old_slots = [value for own in slots.values() for value in _by_layer(network, own)]
    new, new_slots = ([torch.empty_like(value) for value in part] for part in (layers, old_slots))
    inputs, target, indices = inputs.contiguous(), target.contiguous(), indices.contiguous()
    numbers = [coefficients[name].to(torch.float64) for name in program.coefficients]
    table = torch.stack(numbers, -1) if numbers else torch.empty(0, dtype=torch.float64)
    losses = inputs.new_full((copies, steps), torch.nan)
    finite = torch.empty(copies, dtype=torch.bool)
    outcome = library.unroll(
        ctypes.byref(_described(network, widths, batch)), copies, steps, _addresses(layers),
        len(slots), _addresses(old_slots), len(inputs), inputs.data_ptr(), *_of_target(target), indices.data_ptr(),
        step.address, len(numbers), table.data_ptr(), losses.data_ptr(), _addresses(new), _addresses(new_slots),
        finite.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _raise_for(outcome, widths, len(inputs))
    after = [_by_name(network, params, new_slots[i * len(new) : (i + 1) * len(new)]) for i in range(len(slots))]
    new_state: State = {name: {slot: own[name] for slot, own in zip(slots, after, strict=True)} for name in params}
    return losses, _by_name(network, params, new), new_state, finite


def _library(tensors: Iterable[Tensor]) -> ctypes.CDLL | None:
    """The C++ for these tensors, the first of which has the dtype of all numbers."""
    first, *rest = tensors
    command = compiler()
    if (
        command is None
        or first.dtype not in (torch.float32, torch.float64)
        or not all(t.is_cpu for t in (first, *rest))
    ):
        return None
    return _built(first.dtype, command, os.environ.get("METAOPT_CACHE_DIR"))


@lru_cache(maxsize=16)
def _built(dtype: torch.dtype, command: str, cache: str | None) -> ctypes.CDLL | None:
    """The library; ``command`` and ``cache`` are where it comes from (`load_library`)."""
    library = load_library(f"{PRELUDE}typedef {CPP_TYPES[dtype]} T;\n{_ARITHMETIC.read_text('utf-8')}")
    if library is None:
        return None
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.gradients.argtypes = [address, count, *[address] * 6, ctypes.c_int]
    library.unroll.argtypes = [
        address, count, count, address, count, address, count, *[address] * 5, count, *[address] * 5, ctypes.c_int
    ]  # fmt: skip
    return library


def _large(widths: tuple[int, ...], batch: int) -> bool:
    return 6 * batch * sum(into * out for into, out in pairwise(widths)) > _MOST_FLOPS


def _described(network: DenseNetwork, widths: tuple[int, ...], batch: int) -> _Network:
    sizes = (ctypes.c_int64 * len(widths))(*widths)
    activations = (ctypes.c_int64 * len(network.activations))(*map(ACTIVATIONS.index, network.activations))
    return _Network(batch, len(widths) - 1, LOSSES.index(network.loss), activations, sizes, network.label_smoothing)


def _by_layer(network: DenseNetwork, values: Mapping[str, Tensor]) -> list[Tensor]:
    """Weight, bias, weight, ... as they lie in C."""
    return [values[name].contiguous() for layer in network.layers for name in layer]


def _by_name(network: DenseNetwork, params: Params, values: list[Tensor]) -> dict[str, Tensor]:
    """The reverse, in the order of ``params``."""
    named = dict(zip((name for layer in network.layers for name in layer), values, strict=True))
    return {name: named[name] for name in params}


def _addresses(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _of_target(target: Tensor) -> tuple[int | None, int | None]:
    """Addresses of labels and of targets."""
    return (None, target.data_ptr()) if target.is_floating_point() else (target.data_ptr(), None)


def _raise_for(outcome: int, widths: tuple[int, ...], examples: int) -> None:
    """As the enumeration ``Outcome`` of dense.cpp."""
    if outcome == 1:
        raise MemoryError("no memory for the gradients of a dense network")
    if outcome == 2:
        raise IndexError(f"labels must be in [0, {widths[-1]}), as the network has {widths[-1]} outputs")
    if outcome == 3:
        raise IndexError(f"indices must be in [0, {examples}), the number of examples")
