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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaopt.perparameter.features import ACCUMULATORS, BLOCKS, Features, Slots, factored_axes, slot_shapes
from metaopt.program.build import CPP_TYPES, PRELUDE, compiler, load_library
from metaopt.rule import Params, State, compute_dtype

_ARITHMETIC = Path(__file__).with_name("step.cpp")
_MOST_SIDES, _SIDES_SHARE = 1 << 16, 128
"""C++ keeps a hidden vector for every row and column: for so many of them, or for one in so many elements. Skinny matrices
have more, whose hidden vectors would take several times their memory."""


class Network(NamedTuple):
    """What the C++ of one kind of parameter depends on.

    Attributes:
        matrix: whether it has rows and columns.
        sizes: of the network's layers, from its inputs to its outputs.
    """

    matrix: bool
    sizes: tuple[int, ...]


class Step(NamedTuple):
    """What the C++ of one rule depends on besides its networks.

    Attributes:
        features: what the networks see.
        magnitude: the constant of the exponent; None without one.
        own_finish: whether the networks' outputs are written in place of new parameters.
    """

    features: Features
    magnitude: float | None
    own_finish: bool


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
    for block in _blocks(features, network.matrix):
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


def _blocks(features: Features, matrix: bool) -> tuple[str, ...]:
    return features.blocks if matrix else features.blocks[: features.vector_blocks]


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
    counts = {  # blocks of two kinds of accumulators pair them up one by one
        "m_r": (features.momentum, features.rms),
        "factored_m": (features.factored, features.momentum),
    }
    paired = all(counts[block][1] in (1, counts[block][0]) for block in counts.keys() & {*features.blocks})
    size = math.prod(shape)
    if not paired or features.bias_correction or not size or dtype not in (torch.float32, torch.float64):
        return False
    axes = factored_axes(shape, features.layout) if features.factored else None
    if axes is not None and sum(size // shape[axis] for axis in axes) > max(_MOST_SIDES, size // _SIDES_SHARE):
        return False
    # each position of a kernel is a matrix by itself, if it is factored so too
    return not _is_kernel(features, shape) or (features.layout == "torch" and axes in (None, (0, 1), (1, 0)))


def _is_kernel(features: Features, shape: Sequence[int]) -> bool:
    """Whether a parameter has several matrices, each of which has norms of its own."""
    return features.norm == "matrix" and len(shape) > 2


def fused_step(
    step: Step,
    prepared: Any,
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
    copies, dtype = len(first), first.dtype
    if dtype != compute_dtype(dtype) or any(p.dtype != dtype for p in params.values()):
        return None
    for part, given in (
        ("layers", prepared.layers),
        ("scale", prepared.scale),
        ("keep", prepared.keep),
        ("gradient", grads),
    ):
        for name in params.keys() - given.keys():
            raise ValueError(f"{name!r} has no {part}; prepare must return one for every parameter")
    if any(_is_kernel(step.features, p.shape[1:]) for p in params.values()):
        return _by_position(step, prepared, grads, params, state, in_place)
    kinds = {name: _kind(step.features, p.shape[1:], prepared.layers[name]) for name, p in params.items()}
    networks = tuple(sorted({*kinds.values()}))
    function = _function(step, networks, dtype, command, os.environ.get("METAOPT_CACHE_DIR"))
    if function is None:
        return None
    moved: Params = {}
    slots: dict[str, Slots] = {}
    rows, alive = [], []  # what C++ reads must not be freed before
    placed: dict[tuple[int, tuple[int, ...]], tuple[Tensor, int, int]] = {}

    def place(what: str, value: Tensor | None, *shape: int) -> tuple[int, int]:
        """Address, and how far apart copies are; parameters share most tensors."""
        if value is None:
            return 0, 0
        key = id(value), shape
        if key not in placed:
            _require(what, value, (copies, *shape))
            spread = value.to(dtype)
            if not spread[0].is_contiguous():
                spread = spread.contiguous()
            placed[key] = spread, spread.data_ptr(), spread.stride(0) if copies > 1 else 0
        return placed[key][1:]

    decays = []
    for kind in ("momentum", "rms", "factored"):
        count = getattr(step.features, kind)
        if count and kind not in prepared.decays:
            raise ValueError(f"decays has no {kind!r}; prepare must return one number for each of {count} accumulators")
        decays.append(place(f"the decays of {kind}", prepared.decays[kind], count) if count else (0, 0))

    layers = max(len(network.sizes) - 1 for network in networks)
    for name, p in params.items():
        old = {slot: state[name][slot] for slot in ACCUMULATORS if slot in state[name]}
        if in_place and not (p.is_contiguous() and all(value.is_contiguous() for value in old.values())):
            return None
        old = {slot: value.contiguous() for slot, value in old.items()}
        source, grad = p.contiguous(), grads[name].to(dtype).contiguous()
        _require(f"the gradient of {name!r}", grad, tuple(p.shape))
        _require_slots(step.features, name, p, old)
        slots[name] = old if in_place else {slot: torch.empty_like(value) for slot, value in old.items()}
        if step.own_finish:
            outputs = kinds[name].sizes[-1]
            moved[name] = torch.empty((copies, outputs, *p.shape[1:]), dtype=dtype)
        else:
            moved[name] = source if in_place else torch.empty_like(source)
        of_name = f"of {name!r}"
        numbers = [
            place(f"scale {of_name}", prepared.scale[name]),
            place(f"keep {of_name}", prepared.keep[name]),
            *decays,
        ]
        sizes, own = kinds[name].sizes, prepared.layers[name]
        weights = [
            place(f"a weight {of_name}", weight, *ends) for (weight, _), ends in zip(own, pairwise(sizes), strict=True)
        ]
        biases = [place(f"a bias {of_name}", bias, size) for (_, bias), size in zip(own, sizes[1:], strict=True)]
        absent = [(0, 0)] * (layers - len(own))
        at, strides = zip(*numbers, *weights, *absent, *biases, *absent, strict=True)
        alive.append((source, grad, old))
        rows.append(
            [
                networks.index(kinds[name]), *_geometry(step.features, p.shape[1:]),
                source.data_ptr(), grad.data_ptr(), *_addresses(old),
                moved[name].data_ptr(), *_addresses(slots[name]),
                *at[:5], *strides[:5], *at[5:], *strides[5:],
            ]
        )  # fmt: skip
    table = np.array(rows, dtype=np.int64)
    if function(len(rows), copies, table.ctypes.data, torch.get_num_threads()):
        raise MemoryError("the C++ step of a learned rule ran out of memory; use execution='foreach', which needs less")
    return moved, slots


def _by_position(
    step: Step, prepared: Any, grads: Params, params: Params, state: State, in_place: bool
) -> tuple[Params, dict[str, Slots]] | None:
    """`fused_step` with each position of a kernel as a matrix of its own."""
    kernels = {name for name, p in params.items() if _is_kernel(step.features, p.shape[1:])}
    parts = {
        name: [f"{name}[..., {i}]" for i in range(math.prod(p.shape[3:]))] if name in kernels else [name]
        for name, p in params.items()
    }

    def split(name: str, value: Tensor) -> Sequence[Tensor]:
        if name not in kernels:
            return [value]
        return value.flatten(3 - params[name].dim()).movedim(-1, 0).contiguous().unbind()

    def joined(name: str, values: Sequence[Tensor], old: Tensor | None) -> Tensor:
        if name not in kernels:
            return values[0]
        whole = torch.stack([*values], -1).unflatten(-1, params[name].shape[3:])
        return whole if old is None else old.copy_(whole)

    old = {name: {slot: state[name][slot] for slot in ACCUMULATORS if slot in state[name]} for name in params}
    all_grads: Params = {}
    all_params: Params = {}
    all_state: State = {part: {} for own in parts.values() for part in own}
    for name, own in parts.items():
        all_grads |= zip(own, split(name, grads[name]), strict=True)
        all_params |= zip(own, split(name, params[name]), strict=True)
        for slot, value in old[name].items():
            for part, piece in zip(own, split(name, value), strict=True):
                all_state[part][slot] = piece
    shares = ({part: given[name] for name, own in parts.items() for part in own} for given in prepared[1:4])
    for_parts = prepared._replace(**dict(zip(prepared._fields[1:4], shares, strict=True)))
    done = fused_step(step, for_parts, all_grads, all_params, all_state, in_place=in_place)
    if done is None:
        return None
    moved, slots = {}, {}
    for name, own in parts.items():
        to = params[name] if in_place and not step.own_finish else None
        moved[name] = joined(name, [done[0][part] for part in own], to)
        slots[name] = {
            slot: joined(name, [done[1][part][slot] for part in own], value if in_place else None)
            for slot, value in old[name].items()
        }
    return moved, slots


def _kind(features: Features, shape: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]) -> Network:
    sizes = (features.count(tuple(shape)), *(weight.shape[-1] for weight, _ in layers))
    for (weight, bias), ends in zip(layers, pairwise(sizes), strict=True):
        if weight.shape[1:] != ends or bias.shape[1:] != ends[1:]:
            raise ValueError(
                f"a layer between {ends[0]} and {ends[1]} values has weight {tuple(weight.shape[1:])} and bias "
                f"{tuple(bias.shape[1:])}; they must be [in, out] and [out]"
            )
    return Network(len(shape) > 1, sizes)


@lru_cache(maxsize=1024)
def _geometry(features: Features, shape: tuple[int, ...]) -> tuple[int, ...]:
    """size, and of the two factored axes: entries of the first, between them, of the second, after it; which has the rows."""
    size, axes = math.prod(shape), factored_axes(tuple(shape), features.layout)
    if axes is None or not features.factored:
        return size, 1, 1, size, 1, 0
    first, second = sorted(axes)
    between, after = math.prod(shape[first + 1 : second]), math.prod(shape[second + 1 :])
    return size, shape[first], between, shape[second], after, int(axes[1] == second)


def _addresses(slots: Slots) -> list[int]:
    """Of momentum, rms, rows (or the whole second moment), columns."""
    return [
        _address(slots.get("momentum")), _address(slots.get("rms")),
        _address(slots["diag"] if "diag" in slots else slots.get("row")), _address(slots.get("col")),
    ]  # fmt: skip


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _require(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """What C++ reads must be as large as it believes."""
    if value.shape != shape:
        raise ValueError(f"{what} must have shape {shape}, copies first, got {tuple(value.shape)}")


def _require_slots(features: Features, name: str, param: Tensor, slots: Slots) -> None:
    wanted = slot_shapes(features, tuple(param.shape[1:]))
    if slots.keys() != wanted.keys():
        raise ValueError(
            f"the state of {name!r} must hold the accumulators {', '.join(wanted)}, got {', '.join(slots) or 'none'}"
        )
    for slot, shape in wanted.items():
        _require(f"{slot} of {name!r}", slots[slot], (len(param), *shape))
        if slots[slot].dtype != param.dtype:
            raise ValueError(f"{slot} of {name!r} must have dtype {param.dtype}, got {slots[slot].dtype}")
