"""What a compiled step of a per-parameter rule is given: checked tensors by their addresses, one row for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from metaopt.perparameter.features import ACCUMULATORS, Features, Slots, factored_axes, slot_shapes
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.rule import Params, State

Value = TypeVar("Value")
Stepped = tuple[Params, dict[str, Slots]] | None
Place = tuple[int, int]
"""The address of the first copy's numbers, and how many numbers lie between two copies."""


class Network(NamedTuple):
    """What the code for one kind of parameter depends on.

    Attributes:
        matrix: whether it has rows and columns.
        sizes: of the network's layers, from its inputs to its outputs.
    """

    matrix: bool
    sizes: tuple[int, ...]


class Row(NamedTuple):
    """One parameter.

    Attributes:
        network: its kind.
        geometry: size, and of the two factored axes: entries of the first, between them, of the second, after it; and 1 if
            ``row`` has an entry for each of the first.
        tensors: addresses of parameter, gradient, momentum, rms, row (or diag) and col; then of the new parameter (or the
            outputs), momentum, rms, row and col. 0 where there is none.
        numbers: scale, keep, and the decays of momentum, rms and factored.
        weights, biases: of the layers.
    """

    network: Network
    geometry: tuple[int, ...]
    tensors: tuple[int, ...]
    numbers: tuple[Place, ...]
    weights: tuple[Place, ...]
    biases: tuple[Place, ...]


class Table(NamedTuple):
    """All parameters of one call.

    Attributes:
        rows: by name.
        params: what the step is to write: new parameters [K, *shape], or outputs [K, outputs, *shape].
        slots: what the step is to write: new accumulators.
        alive: the tensors that it reads, which must not be freed before.
    """

    rows: dict[str, Row]
    params: Params
    slots: dict[str, Slots]
    alive: list[Tensor]


@lru_cache(maxsize=4096)
def compilable(features: Features, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether code is generated for these features and a parameter of this shape and dtype."""
    counts = {  # blocks of two kinds of accumulators pair them up one by one
        "m_r": (features.momentum, features.rms),
        "factored_m": (features.factored, features.momentum),
    }
    paired = all(counts[block][1] in (1, counts[block][0]) for block in counts.keys() & {*features.blocks})
    if not paired or features.bias_correction or not math.prod(shape) or dtype not in (torch.float32, torch.float64):
        return False
    axes = factored_axes(shape, features.layout) if features.factored else None
    # each position of a kernel is a matrix by itself, if it is factored so too
    return not is_kernel(features, shape) or (features.layout == "torch" and axes in (None, (0, 1), (1, 0)))


def is_kernel(features: Features, shape: Sequence[int]) -> bool:
    """Whether a parameter has several matrices, each of which has norms of its own: `by_position` is for them."""
    return features.norm == "matrix" and len(shape) > 2


def tabulate(
    step: Step, prepared: Prepared, grads: Params, params: Params, state: State, in_place: bool
) -> Table | None:
    """Check and lay out what a compiled step reads and writes; None if ``in_place`` but something is not contiguous.

    The arguments are those of `metaopt.perparameter.cpp.fused_step`.

    Raises:
        ValueError: a tensor that is missing, or has another shape, dtype or device than its parameter and features ask for.
    """
    first = next(iter(params.values()))
    copies = len(first)
    _require_all(prepared, grads, params)
    table = Table({}, {}, {}, [])
    placed: dict[tuple[int, tuple[int, ...]], Place] = {}

    def place(what: str, value: Tensor, *shape: int) -> Place:
        """Parameters share most tensors."""
        key = id(value), shape
        if key not in placed:
            _require(what, value, (copies, *shape))
            spread = value.to(first)
            if not spread[0].is_contiguous():
                spread = spread.contiguous()
            table.alive.append(spread)
            placed[key] = spread.data_ptr(), spread.stride(0) if copies > 1 else 0
        return placed[key]

    decays = []
    for kind in ("momentum", "rms", "factored"):
        count = getattr(step.features, kind)
        if count and kind not in prepared.decays:
            raise ValueError(f"decays has no {kind!r}; prepare must return one number for each of {count} accumulators")
        decays.append(place(f"the decays of {kind}", prepared.decays[kind], count) if count else (0, 0))

    for name, p in params.items():
        shape, layers = tuple(p.shape[1:]), prepared.layers[name]
        sizes = _sizes(step.features, shape, layers)
        old = {slot: state[name][slot] for slot in ACCUMULATORS if slot in state[name]}
        if in_place and not (p.is_contiguous() and all(value.is_contiguous() for value in old.values())):
            return None
        old = {slot: value.contiguous() for slot, value in old.items()}
        source, grad = p.contiguous(), grads[name].to(first).contiguous()
        _require(f"the gradient of {name!r}", grad, tuple(p.shape))
        _require_slots(step.features, name, p, old)
        slots = old if in_place else {slot: torch.empty_like(value) for slot, value in old.items()}
        if step.own_finish:
            moved = source.new_empty((copies, sizes[-1], *shape))
        else:
            moved = source if in_place else torch.empty_like(source)
        of_name = f"of {name!r}"
        table.rows[name] = Row(
            Network(len(shape) > 1, sizes),
            geometry(step.features, shape),
            (source.data_ptr(), grad.data_ptr(), *_addresses(old), moved.data_ptr(), *_addresses(slots)),
            (
                place(f"scale {of_name}", prepared.scale[name]),
                place(f"keep {of_name}", prepared.keep[name]),
                *decays,
            ),
            tuple(
                place(f"a weight {of_name}", weight, *n) for (weight, _), n in zip(layers, pairwise(sizes), strict=True)
            ),
            tuple(place(f"a bias {of_name}", bias, n) for (_, bias), n in zip(layers, sizes[1:], strict=True)),
        )
        table.alive.extend((source, grad, *old.values()))
        table.params[name], table.slots[name] = moved, slots
    return table


def by_position(
    fused_step: Callable[..., Stepped],
    step: Step,
    prepared: Prepared,
    grads: Params,
    params: Params,
    state: State,
    in_place: bool,
) -> Stepped:
    """``fused_step`` with each position of a kernel as a matrix of its own."""
    _require_all(prepared, grads, params)
    kernels = {name for name, p in params.items() if is_kernel(step.features, p.shape[1:])}
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

    def shares(given: Mapping[str, Value]) -> dict[str, Value]:
        return {part: given[name] for name, own in parts.items() for part in own}

    for_parts = prepared._replace(
        layers=shares(prepared.layers), scale=shares(prepared.scale), keep=shares(prepared.keep)
    )
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


@lru_cache(maxsize=1024)
def geometry(features: Features, shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `Row`; without factored accumulators a parameter is one axis."""
    size, axes = math.prod(shape), factored_axes(tuple(shape), features.layout)
    if axes is None or not features.factored:
        return size, 1, 1, size, 1, 0
    first, second = sorted(axes)
    between, after = math.prod(shape[first + 1 : second]), math.prod(shape[second + 1 :])
    return size, shape[first], between, shape[second], after, int(axes[1] == second)


def _sizes(features: Features, shape: tuple[int, ...], layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
    sizes = (features.count(shape), *(weight.shape[-1] for weight, _ in layers))
    for (weight, bias), ends in zip(layers, pairwise(sizes), strict=True):
        if weight.shape[1:] != ends or bias.shape[1:] != ends[1:]:
            raise ValueError(
                f"a layer between {ends[0]} and {ends[1]} values has weight {tuple(weight.shape[1:])} and bias "
                f"{tuple(bias.shape[1:])}; they must be [in, out] and [out]"
            )
    return sizes


def _addresses(slots: Slots) -> list[int]:
    """Of momentum, rms, rows (or the whole second moment), columns."""
    rows = "diag" if "diag" in slots else "row"
    return [slots[slot].data_ptr() if slot in slots else 0 for slot in ("momentum", "rms", rows, "col")]


def _require_all(prepared: Prepared, grads: Params, params: Params) -> None:
    for part, given in (
        ("layers", prepared.layers),
        ("scale", prepared.scale),
        ("keep", prepared.keep),
        ("gradient", grads),
    ):
        for name in params.keys() - given.keys():
            raise ValueError(f"{name!r} has no {part}; prepare must return one for every parameter")


def _require(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """What compiled code reads must be as large as it believes."""
    if value.shape != shape:
        raise ValueError(f"{what} must have shape {shape}, copies first, got {tuple(value.shape)}")


def _require_slots(features: Features, name: str, param: Tensor, slots: Slots) -> None:
    wanted = slot_shapes(features, tuple(param.shape[1:]))
    if slots.keys() != wanted.keys():
        raise ValueError(
            f"the state of {name!r} must hold the accumulators {', '.join(wanted)}, got {', '.join(slots) or 'none'}"
        )
    for slot, shape in wanted.items():
        value = slots[slot]
        _require(f"{slot} of {name!r}", value, (len(param), *shape))
        if value.dtype != param.dtype or value.device != param.device:
            raise ValueError(
                f"{slot} of {name!r} must have dtype {param.dtype} on {param.device}, got {value.dtype} on {value.device}"
            )
