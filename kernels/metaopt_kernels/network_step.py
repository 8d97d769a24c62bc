"""One step of a learned rule with a per-parameter network in Triton, for all copies of all parameters.

Small tensors, or many copies, take one launch, with a program for each copy of each tensor; large tensors take one launch for
each phase (`metaopt_kernels.network_phases`): six of them, or three where no parameter has rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from metaopt import registry
from metaopt.perparameter.features import Features, Slots, factored_axes
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.perparameter.table import Row, by_position, compilable, is_kernel, tabulate
from metaopt.rule import Params, State, compute_dtype
from metaopt_kernels import network_phases as phases
from metaopt_kernels.aot import AotCase
from metaopt_kernels.network_source import Kind, clip_arguments, step_source, width
from metaopt_kernels.source import load_module
from metaopt_kernels.tables import DEVICE, on_device

PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16")
"""Of matrix products: float32; 10 bits of fraction; three such products for nearly all of float32; bfloat16.

Of a network 28 -> 32 -> 32 -> 2 with random weights, errors against float64 relative to the largest output are 3e-7, 1.4e-3,
8e-7 and 5e-3 (rounding imitated in torch; what is cut to 10 bits is truncated, as the hardware may)."""

ONE_LAUNCH, MANY_COPIES = 4096, 256
"""One launch takes all phases where no tensor has more elements, or where so many copies keep all processors busy."""
SPAN = 1 << 14
"""Elements of which one program of a phase takes care."""

_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
_REALS = {torch.float32: "float32", torch.float64: "float64"}
_ACROSS, _ALONG, _ENTRIES = phases.ACROSS.value, phases.ALONG.value, phases.ENTRIES.value


def supports(features: Features, shape: Sequence[int], like: Tensor) -> bool:
    """Whether kernels know these features and can step a parameter of this shape.

    Args:
        features: what the network sees.
        shape: of one copy of the parameter.
        like: has its dtype, which may be one that is widened, and its device.
    """
    shape = tuple(shape)
    if like.device.type != DEVICE or not compilable(features, shape, compute_dtype(like.dtype)):
        return False
    # elements are counted in 64 bits, rows and columns in 32
    axes = factored_axes(shape, features.layout) if features.factored else None
    return axes is None or all(math.prod(shape) // shape[axis] < 1 << 30 for axis in axes)


def fused_step(
    step: Step,
    prepared: Prepared,
    grads: Params,
    params: Params,
    state: State,
    *,
    in_place: bool = False,
    precision: str = "tf32x3",
) -> tuple[Params, dict[str, Slots]] | None:
    """One step of K copies; nothing is recorded. See `metaopt.perparameter.cpp.fused_step`.

    Args:
        step: of which rule.
        prepared: `Prepared`, every tensor of it with a leading dimension K.
        grads: [K, *shape] each; need not be clipped.
        params: [K, *shape] each, all float32 or all float64; accumulators likewise.
        state: with the accumulators [K, n, ...].
        in_place: overwrite parameters and accumulators, which must be contiguous; else new ones are made.
        precision: one of `PRECISIONS`, for networks that are wider than `network_source.MOST_UNROLLED`.

    Returns:
        New parameters, or with ``step.own_finish`` the networks' outputs [K, outputs, *shape], while parameters stay; and
        new accumulators. None where the plain form has to run.

    Raises:
        ValueError: an unknown precision; a tensor that is missing, or has another shape, dtype or device than its parameter
            and features ask for.
        OSError: the cache directory cannot be written.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not params or not all(supports(step.features, p.shape[1:], p) for p in params.values()):
        return None
    first = next(iter(params.values()))
    if first.dtype != compute_dtype(first.dtype) or any(p.dtype != first.dtype for p in params.values()):
        return None
    if any(is_kernel(step.features, p.shape[1:]) for p in params.values()):
        own = partial(fused_step, precision=precision)
        return by_position(own, step, prepared, grads, params, state, in_place)
    table = tabulate(step, prepared, grads, params, state, in_place)
    if table is None:
        return None
    with torch.cuda.device_of(first):
        _launch(step, [*table.rows.values()], first, precision)
    return table.params, table.slots


def _launch(step: Step, rows: list[Row], first: Tensor, precision: str) -> None:
    features, copies = step.features, len(first)
    rows.sort(key=lambda row: -row.geometry[0])  # the longest programs first
    whole = rows[0].geometry[0] <= ONE_LAUNCH or copies >= MANY_COPIES
    kinds = [kind_of(row, features) for row in rows]
    distinct = tuple(sorted({*kinds}))
    counts = [counts_of(row.geometry, kind.form, whole) for row, kind in zip(rows, kinds, strict=True)]
    numbers, scratch = numbers_of(
        rows, [distinct.index(kind) for kind in kinds], counts, copies, features, width(distinct)
    )
    real = _REALS[first.dtype]
    columns = numbers.shape[1]
    kernels = _module(step, distinct, real, precision, columns)
    table = _place(numbers, first.device)
    workspace = first.new_empty(scratch)
    if whole:
        kernels.whole[(len(rows) * copies,)](table, copies, workspace, **_OPTIONS)
        return

    def launch(kernel: triton.JITFunction, blocks: Sequence[int], **constants: object) -> None:
        """One program for each of so many blocks of each tensor."""
        if any(blocks):
            items = _place(_items(tuple(blocks)), first.device)
            kernel[(len(items) * copies,)](table, items, copies, workspace, **constants, **_OPTIONS)

    clip, nan_to_zero = clip_arguments(features)
    same = {"COLUMNS": columns, "REAL": getattr(tl, real)}
    launch(phases.sums, [n.sums for n in counts], **same, CLIP=clip, NAN_TO_ZERO=nan_to_zero)
    launch(phases.moments, [n.moments for n in counts], **same, FACTORS=features.factored)
    launch(phases.relations, [min(n.moments, 1) for n in counts], **same, FACTORS=features.factored)
    launch(kernels.accumulations, [n.spans for n in counts], SPAN=SPAN)
    launch(phases.normalisers, [1] * len(rows), **same, EPS=features.norm_eps, WIDTH=width(distinct))
    launch(kernels.applications, [n.spans for n in counts], SPAN=SPAN)


class Counts(NamedTuple):
    """How one tensor is divided: chunks of sums over lines, over columns and of squares; blocks of three phases."""

    line_chunks: int
    column_chunks: int
    spans: int
    sums: int
    moments: int


def counts_of(geometry: tuple[int, ...], form: str, whole: bool) -> Counts:
    """How a tensor of this geometry is divided; one that is ``whole`` belongs to one program."""
    size, n1, _, n2, _, _ = geometry
    spans = 1 if whole else triton.cdiv(size, SPAN)
    if form == "flat":
        return Counts(0, 0, spans, 0, 0)
    lines, columns = size // n2, size // n1
    at_once = _ALONG if form == "plain" else _ACROSS
    line_chunks = 1 if whole else triton.cdiv(n2 * at_once, SPAN)
    column_chunks = 1 if whole else triton.cdiv(n1 * _ACROSS, SPAN)
    sums = line_chunks * triton.cdiv(lines, at_once) + column_chunks * triton.cdiv(columns, _ACROSS)
    return Counts(
        line_chunks, column_chunks, spans, sums, triton.cdiv(lines, _ENTRIES) + triton.cdiv(columns, _ENTRIES)
    )


def kind_of(row: Row, features: Features) -> Kind:
    """What the generated code of a tensor depends on."""
    size, n1, _, n2, _, _ = row.geometry
    if not (features.factored and row.network.matrix):
        form = "flat"
    else:
        form = "plain" if n1 * n2 == size else "kernel"
    aligned = size % 4 == 0 and not any(address % 16 for address in row.tensors)
    return Kind(form, row.network.matrix, row.network.sizes, aligned)


def numbers_of(
    rows: Sequence[Row], kinds: Sequence[int], counts: Sequence[Counts], copies: int, features: Features, width: int
) -> tuple[np.ndarray, int]:
    """The table, and how many numbers of scratch memory there are."""
    layers = max(len(row.weights) for row in rows)
    table, scratch = [], 0
    for row, kind, n in zip(rows, kinds, counts, strict=True):
        size, n1, _, n2, _, row_is_line = row.geometry
        lines, columns = (size // n2, size // n1) if n.moments else (0, 0)
        parts = (
            n.line_chunks * lines,
            n.column_chunks * columns,
            features.factored * (lines if row_is_line else columns),
            n.spans * width,
            width,
        )
        starts = np.cumsum((scratch, *parts)).tolist()
        places = [*row.numbers, *chain.from_iterable(zip(row.weights, row.biases, strict=True))]
        places += [(0, 0)] * (2 * (layers - len(row.weights)))
        table.append(
            [
                kind, *row.geometry, *row.tensors, n.line_chunks, n.column_chunks, n.spans, *starts[:5], sum(parts),
                *chain.from_iterable(places),
            ]
        )  # fmt: skip
        scratch += copies * sum(parts)
    return np.array(table, dtype=np.int64), scratch


@lru_cache(maxsize=64)
def _module(step: Step, kinds: tuple[Kind, ...], real: str, precision: str, columns: int) -> ModuleType:
    return load_module(step_source(step, kinds, real, precision, columns), "network_step")


@lru_cache(maxsize=256)
def _items(blocks: tuple[int, ...]) -> np.ndarray:
    """[n, 2]: the tensor and the number of every block."""
    return np.array([(tensor, block) for tensor, n in enumerate(blocks) for block in range(n)], dtype=np.int64)


def _place(numbers: np.ndarray, device: torch.device) -> Tensor:
    """``numbers`` on the device; a training loop's tensors stay where they are, or come back there."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # a graph fills tables of its own
        return on_device(numbers.ravel().tolist(), torch.int64, device).view(numbers.shape)
    return _placed(numbers.tobytes(), numbers.shape, device)


@lru_cache(maxsize=256)
def _placed(numbers: bytes, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(numbers), dtype=torch.int64).view(shape).to(device)


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """The kernels of common rules, for a matrix and a vector, and the phases that all rules share."""
    chosen: list[tuple[str, str, dict[str, int], str]] = [
        ("adafac_4", "small_fc_lopt", {"hidden": 4}, "ieee"),
        ("adafac_32.ieee", "small_fc_lopt", {"hidden": 32}, "ieee"),
        ("adafac_32.tf32", "small_fc_lopt", {"hidden": 32}, "tf32"),
        ("adafac_32.tf32x3", "small_fc_lopt", {"hidden": 32}, "tf32x3"),
        ("adafac_32.bf16", "small_fc_lopt", {"hidden": 32}, "bf16"),
        ("celo2_base", "celo2_base", {}, "ieee"),
    ]
    of_table = {"table": "*i64", "copies": "i32", "scratch": "*fp32"}
    of_items = {"table": "*i64", "items": "*i64", "copies": "i32", "scratch": "*fp32"}
    columns = phases.LAYERS.value + 4 * 3  # three layers
    shared = {"COLUMNS": columns, "REAL": tl.float32}

    def case(name: str, function: Any, signature: dict[str, str], constants: dict[str, Any]) -> AotCase:
        divisible = tuple(argument for argument in ("table", "items", "scratch") if argument in signature)
        options = {**_OPTIONS}
        return AotCase(
            f"network_step.{name}", function, signature, constants, options.pop("num_warps"), divisible, options
        )

    cases = [
        case(name, function, of_items, shared | constants)
        for name, function, constants in (
            ("sums", phases.sums, {"CLIP": 1000.0, "NAN_TO_ZERO": True}),
            ("moments", phases.moments, {"FACTORS": 3}),
            ("relations", phases.relations, {"FACTORS": 3}),
            ("normalisers", phases.normalisers, {"EPS": 1e-5, "WIDTH": 32}),
        )
    ]
    for name, rule, options_of_rule, precision in chosen:
        made: Any = registry.create("learned_optimizer", rule, **options_of_rule)
        rest = (made.hidden, made.hidden, 1 if made.has_own_finish else 2)
        kinds = tuple(
            Kind(form, form != "flat", (made.features.count(shape), *rest), True)
            for form, shape in (("flat", (2,)), ("plain", (2, 2)))
        )
        module = _module(made.kernel_step, kinds, "float32", precision, columns)
        kernels = [("whole", of_table, {}), ("applications", of_items, {"SPAN": SPAN})]
        if precision == "ieee":  # accumulations multiply no matrices
            kernels.append(("accumulations", of_items, {"SPAN": SPAN}))
        for kernel, signature, constants in kernels:
            cases.append(case(f"{name}.{kernel}", getattr(module, kernel), signature, constants))
    return cases
