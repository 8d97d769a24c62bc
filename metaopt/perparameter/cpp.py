"""One step of a per-parameter rule in C++, for all copies of all parameters: accumulators, features, network, new values.

``step.cpp`` holds the arithmetic; here its constants are written for one rule's features and networks, and its table of
addresses is filled. Where this is not possible `fused_step` returns None, and the plain form of `PerParameterRule` runs.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaopt.perparameter.features import BLOCKS, Features, Slots, factored_axes
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.perparameter.table import Network, Row, by_position, compilable, is_kernel, tabulate
from metaopt.program.build import CPP_TYPES, PRELUDE, compiler, load_library
from metaopt.rule import Params, State, compute_dtype

_ARITHMETIC = Path(__file__).with_name("step.cpp")
_MOST_SIDES, _SIDES_SHARE = 1 << 16, 128
"""C++ keeps a hidden vector for every row and column: for so many of them, or for one in so many elements. Skinny matrices
have more, whose hidden vectors would take several times their memory."""


def step_source(step: Step, networks: Sequence[Network], real: str) -> str:
    """The C++ text of a step.

    Args:
        step: the rule.
        networks: the kinds of parameters, in the order of their numbers in the table.
        real: in which everything is stored and computed: ``float`` or ``double``.
    """
    features = step.features
    layers = max(len(network.sizes) - 1 for network in networks)
    constants = [
        f"typedef {real} T;",
        f"constexpr bool HAS_CLIP = {_truth(math.isfinite(features.clip))}, OWN_FINISH = {_truth(step.own_finish)}, "
        f"HAS_MAGNITUDE = {_truth(step.magnitude is not None)}, NAN_TO_ZERO = {_truth(features.nan_to_zero)};",
        f"constexpr T CLIP = {_number(features.clip)}, RMS_EPS = {_number(features.rms_eps)}, "
        f"DIAGONAL_EPS = {_number(features.diagonal_eps)}, NORM_EPS = {_number(features.norm_eps)}, "
        f"MAGNITUDE = {_number(step.magnitude or 0.0)};",
        f"constexpr int MOST_LAYERS = {layers}, MOST_FACTORS = {max(features.factored, 1)}, "
        f"WIDEST_FIRST = {max(network.sizes[1] for network in networks)};",
    ]
    kinds = [line for i, network in enumerate(networks) for line in _network(features, network, i)]
    cases = [f"        case {i}: return Run<Network{i}>(tensor, copy).step(threads);" for i, _ in enumerate(networks)]
    dispatch = [
        "void one(const Tensor& tensor, const int64_t copy, const int threads) {",
        "    switch (tensor.network) {", *cases, "    }", "}",
    ]  # fmt: skip
    generated = ["namespace {", *kinds, *dispatch, "}"]
    return "\n".join([PRELUDE, *constants, _ARITHMETIC.read_text("utf-8"), *generated, ""])


def _network(features: Features, network: Network, number: int) -> list[str]:
    """A structure with the row of the first weight at which each block begins, or -1."""
    rows, row = dict.fromkeys(BLOCKS, -1), 0
    for block in features.blocks if network.matrix else features.blocks[: features.vector_blocks]:
        rows[block] = row
        row += features.planes(block)
    begins = ", ".join(f"{block.upper()} = {row}" for block, row in rows.items())
    widest = max(network.sizes[1:])
    return [
        f"struct Network{number} {{",
        f"    static constexpr bool FACTORED = {_truth(network.matrix and features.factored > 0)};",
        f"    static constexpr int {begins};",
        f"    static constexpr int MOMENTA = {features.momentum}, RMSES = {features.rms}, FACTORS = {features.factored};",
        f"    static constexpr int LAYERS = {len(network.sizes) - 1}, WIDEST = {widest};",
        f"    static constexpr int SIZES[] = {{{', '.join(map(str, network.sizes))}}};",
        "};",
    ]


def _number(value: float) -> str:
    return f"T({value!r})" if math.isfinite(value) else "std::numeric_limits<T>::infinity()"


def _truth(value: bool) -> str:
    return "true" if value else "false"


@lru_cache(maxsize=256)
def _function(
    step: Step, networks: tuple[Network, ...], dtype: torch.dtype, command: str, cache: str | None
) -> Callable[..., None] | None:
    """The compiled step; ``command`` and ``cache`` are where it comes from (`load_library`)."""
    library = load_library(step_source(step, networks, CPP_TYPES[dtype]))
    if library is None:
        return None
    function = library.step
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def supports(features: Features, shape: Sequence[int], like: Tensor) -> bool:
    """Whether there is a compiler, and C++ knows these features and can step a parameter of this shape.

    Args:
        features: what the network sees.
        shape: of one copy of the parameter.
        like: has its dtype, which may be one that is widened, and its device.
    """
    return compiler() is not None and like.is_cpu and _reached(features, tuple(shape), compute_dtype(like.dtype))


@lru_cache(maxsize=4096)
def _reached(features: Features, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    if not compilable(features, shape, dtype):
        return False
    axes = factored_axes(shape, features.layout) if features.factored else None
    size = math.prod(shape)
    return axes is None or sum(size // shape[axis] for axis in axes) <= max(_MOST_SIDES, size // _SIDES_SHARE)


def fused_step(
    step: Step,
    prepared: Prepared,
    grads: Params,
    params: Params,
    state: State,
    *,
    in_place: bool = False,
) -> tuple[Params, dict[str, Slots]] | None:
    """One step of K copies; nothing is recorded.

    Args:
        step: of which rule.
        prepared: `Prepared`, every tensor of it with a leading dimension K.
        grads: [K, *shape] each; need not be clipped.
        params: [K, *shape] each, all float32 or all float64; accumulators likewise.
        state: with the accumulators [K, n, ...].
        in_place: overwrite parameters and accumulators, which must be contiguous; else new ones are made.

    Returns:
        New parameters, or with ``step.own_finish`` the networks' outputs [K, outputs, *shape], while parameters stay; and
        new accumulators. None where the plain form has to run: no compiler, another device or dtype, bias correction, norms
        over matrices of a convolution that are factored otherwise, skinny matrices.

    Raises:
        ValueError: a tensor that is missing, or has another shape or dtype than its parameter and features ask for.
        MemoryError: out of memory; what was to be overwritten may be so in part.
    """
    command = compiler()
    if command is None or not params or not all(supports(step.features, p.shape[1:], p) for p in params.values()):
        return None
    first = next(iter(params.values()))
    dtype = first.dtype
    if dtype != compute_dtype(dtype) or any(p.dtype != dtype for p in params.values()):
        return None
    if any(is_kernel(step.features, p.shape[1:]) for p in params.values()):
        return by_position(fused_step, step, prepared, grads, params, state, in_place)
    table = tabulate(step, prepared, grads, params, state, in_place)
    if table is None:
        return None
    networks = tuple(sorted({row.network for row in table.rows.values()}))
    function = _function(step, networks, dtype, command, os.environ.get("METAOPT_CACHE_DIR"))
    if function is None:
        return None
    layers = max(len(network.sizes) for network in networks) - 1
    numbers = np.array([_numbers(row, networks, layers) for row in table.rows.values()], dtype=np.int64)
    if function(len(numbers), len(first), numbers.ctypes.data, torch.get_num_threads()):
        raise MemoryError("the C++ step of a learned rule ran out of memory; use execution='foreach', which needs less")
    return table.params, table.slots


def _numbers(row: Row, networks: Sequence[Network], layers: int) -> list[int]:
    """A structure ``Tensor`` of C++."""
    absent = [(0, 0)] * (layers - len(row.weights))
    (at, strides), (of_layers, layer_strides) = (
        zip(*places, strict=True) for places in (row.numbers, [*row.weights, *absent, *row.biases, *absent])
    )
    return [networks.index(row.network), *row.geometry, *row.tensors, *at, *strides, *of_layers, *layer_strides]
