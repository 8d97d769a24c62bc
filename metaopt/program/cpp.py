"""Run a Program in place as generated C++: one pass over memory for all parameters, built by the compiler at hand.

Nothing here is required: where there is no compiler, or a build fails, `compile_cpp` returns None and the caller runs
`metaopt.program.inplace`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from array import array
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from metaopt.program.build import CPP_TYPES, PRELUDE, compiler, load_library
from metaopt.program.columns import are_flat
from metaopt.program.ops import COMPARISONS, OPS
from metaopt.program.program import Arg, Program, Statement

SERIAL_BELOW = 1 << 15
"""Elements under which a second thread costs more than it saves."""

_PREAMBLE = """
typedef {compute} T;

struct bf16 {{ uint16_t bits; }};
static inline T load(const float x) {{ return T(x); }}
static inline T load(const double x) {{ return T(x); }}
static inline T load(const bf16 x) {{
    const uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return T(value);
}}
static inline void store(float& x, const T value) {{ x = float(value); }}
static inline void store(double& x, const T value) {{ x = double(value); }}
static inline void store(bf16& x, const T value) {{  // to nearest, ties to even; every NaN becomes the quiet one
    const float narrow = float(value);
    uint32_t wide;
    std::memcpy(&wide, &narrow, 4);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    x.bits = uint16_t(narrow != narrow ? 0x7fc0u : rounded);
}}
"""

EXTREMA = """
static inline T nan_max(const T a, const T b) { return (a != a || a > b) ? a : b; }
static inline T nan_min(const T a, const T b) { return (a != a || a < b) ? a : b; }
"""
"""What the C++ forms of operations call."""

_DRIVER = """\

// Tensor j of column k is pointers[k * count + j], and its coefficients begin at coefficients[j * stride]. Each thread
// takes an equal share of all elements, cut at multiples of 16 within a tensor so that no two threads write to one cache line.
static void share(const int64_t count, void* const* pointers, const int64_t* sizes, const double* coefficients,
                  const int64_t stride, const int64_t from, const int64_t to) {
    T c[COEFFICIENTS + 1];
    int64_t offset = 0;
    for (int64_t j = 0; j < count && offset < to; offset += sizes[j], ++j) {
        const int64_t size = sizes[j];
        const int64_t begin = from <= offset ? 0 : (from - offset) / 16 * 16;
        const int64_t end = to >= offset + size ? size : (to - offset) / 16 * 16;
        if (begin >= end) continue;
        for (int k = 0; k < COEFFICIENTS; ++k) c[k] = T(coefficients[j * stride + k]);
        update(pointers + j, count, begin, end, c);
    }
}

extern "C" void step(const int64_t count, void* const* pointers, const int64_t* sizes, const double* coefficients,
                     const int64_t stride, const int threads) {
    int64_t total = 0;
    for (int64_t j = 0; j < count; ++j) total += sizes[j];
#ifdef _OPENMP
    if (threads > 1 && total >= SERIAL_BELOW) {
        #pragma omp parallel num_threads(threads)
        {
            const int64_t n = omp_get_num_threads(), k = omp_get_thread_num();
            share(count, pointers, sizes, coefficients, stride, total * k / n, total * (k + 1) / n);
        }
        return;
    }
#endif
    share(count, pointers, sizes, coefficients, stride, 0, total);
}
"""


# -- source ------------------------------------------------------------------------------------------------------------


def cpp_source(program: Program, param_type: str, grad_type: str, state_type: str, out_of_place: bool = False) -> str:
    """The C++ text of one step over many tensors.

    Args:
        program: what to run.
        param_type: how parameters are stored: ``float``, ``double`` or ``bf16``. Arithmetic is in double if they are
            double, otherwise in float.
        grad_type: how gradients are stored.
        state_type: how the slots are stored.
        out_of_place: write parameters and slots to columns of their own, which follow those that are read.

    Returns:
        Source that exports ``step(count, pointers, sizes, coefficients, stride, threads)``.

    Raises:
        ValueError: an unknown type.
    """
    for name in (param_type, grad_type, state_type):
        if name not in CPP_TYPES.values():
            raise ValueError(f"{name!r} is no storage type; choose from {', '.join(CPP_TYPES.values())}")
    compute = "double" if param_type == "double" else "float"
    types = [param_type, grad_type, *[state_type] * (len(program.tensors) - 2)]
    names = identifiers(program)
    body = []
    for k, stored in enumerate(types):
        const = "const " if k == 1 or out_of_place else ""
        body.append(f"{const}{stored}* __restrict p{k} = static_cast<{const}{stored}*>(at[{k} * count]);")
    if out_of_place:
        for j, k in enumerate((0, *range(2, len(types))), start=len(types)):
            body.append(f"{types[k]}* __restrict q{k} = static_cast<{types[k]}*>(at[{j} * count]);")
    body += [f"const T {names[name]} = c[{k}];" for k, name in enumerate(program.coefficients)]
    body += ["INDEPENDENT", "for (int64_t i = begin; i < end; ++i) {"]
    body += [f"    const T {names[tensor]} = load(p{k}[i]);" for k, tensor in enumerate(program.tensors)]
    truths = {s.target for s in program.kernel if s.op in COMPARISONS}
    body += [f"    {_statement(s, names, truths)}" for s in program.kernel]
    outputs = (_value(out, names) for out in program.outputs)
    columns = (0, *range(2, len(program.tensors)))
    written = [f"q{k}" if out_of_place else f"p{k}" for k in columns]
    body += [f"    store({to}[i], T({out}));" for to, out in zip(written, outputs, strict=True)]
    signature = "void update(void* const* at, const int64_t count, const int64_t begin, const int64_t end, const T* c)"
    lines = [f"static {signature} {{", *(f"    {line}" for line in [*body, "}"]), "}"]
    driver = _DRIVER.replace("COEFFICIENTS", str(len(program.coefficients))).replace("SERIAL_BELOW", str(SERIAL_BELOW))
    return PRELUDE + _PREAMBLE.format(compute=compute) + EXTREMA + "\n" + "\n".join(lines) + "\n" + driver


def identifiers(program: Program) -> dict[Arg, str]:
    """Names for generated code that cannot meet a keyword, a macro or a letter that the compiler does not take."""
    known = [*program.tensors, *program.coefficients, *(s.target for s in program.kernel)]
    return {name: f"v_{name}" if name.isascii() else f"u{k}" for k, name in enumerate(known)}


def _value(arg: Arg, names: Mapping[Arg, str]) -> str:
    if isinstance(arg, str):
        return names[arg]
    if math.isnan(arg):
        return "std::numeric_limits<T>::quiet_NaN()"
    if math.isinf(arg):
        return f"{'-' if arg < 0 else ''}std::numeric_limits<T>::infinity()"
    return f"T({arg!r})"


def _statement(s: Statement, names: Mapping[Arg, str], truths: Collection[Arg]) -> str:
    """``const T target = ...;``; comparisons (``truths``) are bool and become numbers where one is asked for."""
    numbers = [f"T({names[arg]})" if arg in truths else _value(arg, names) for arg in s.args]
    kind, form = "T", OPS[s.op].cpp
    if s.op in COMPARISONS:
        kind = "bool"
    elif s.op == "where":
        numbers[0] = _value(s.args[0], names)
    elif s.op == "pow":
        form = _POWERS.get(s.args[1], form)
    return f"const {kind} {names[s.target]} = {form.format(*numbers)};"


_POWERS: dict[Arg, str] = {
    0.0: "T(1)", 0.5: "std::sqrt({0})", 1.0: "{0}", 2.0: "({0} * {0})", 3.0: "({0} * {0} * {0})",
    -0.5: "(T(1) / std::sqrt({0}))", -1.0: "(T(1) / {0})", -2.0: "(T(1) / ({0} * {0}))",
}  # fmt: skip
"""The exponents that torch does not hand to ``pow`` either."""


# -- building ----------------------------------------------------------------------------------------------------------


def compile_cpp(
    program: Program,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtype: torch.dtype,
    out_of_place: bool = False,
) -> CppStep | None:
    """The compiled step of ``program`` for tensors of these dtypes, or None where it cannot be had (`load_library`).

    In place it is called as it is; ``out_of_place`` it has the method `CppStep.copies`. A dtype other than float32, float64
    and bfloat16 (compilers do not vectorise fp16), or a program that reduces tensors: None.
    """
    dtypes = (param_dtype, grad_dtype, state_dtype)
    command = compiler()
    if command is None or program.reach != "element" or any(dtype not in CPP_TYPES for dtype in dtypes):
        return None
    return _compile(program, dtypes, out_of_place, command, os.environ.get("METAOPT_CACHE_DIR"))


@functools.lru_cache(maxsize=1024)
def _compile(
    program: Program,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    out_of_place: bool,
    command: str,
    cache: str | None,
) -> CppStep | None:
    param, grad, state = (CPP_TYPES[dtype] for dtype in dtypes)
    library = load_library(cpp_source(program, param, grad, state, out_of_place))
    return None if library is None else CppStep(program, dtypes, library)


# -- running -----------------------------------------------------------------------------------------------------------


class CppStep:
    """One step of a program over many CPU tensors: ``step(columns, coefficients)``.

    ``columns`` holds, per name in ``program.tensors``, a list of tensors; ``coefficients`` are the floats of
    ``program.scalar_values``. Parameters and slots are updated in place; gradients are only read. The call trusts that
    `fits` holds: it hands bare addresses to C++.

    Attributes:
        program: what it runs.
        dtypes: of parameters, gradients and slots.
        address: of the C function ``step``, for C++ that takes whole training runs.
    """

    def __init__(
        self, program: Program, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], library: ctypes.CDLL
    ) -> None:
        self.program = program
        self.dtypes = dtypes
        self._names = program.coefficients
        self._function = library.step
        self._function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int]
        self._function.restype = None
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value

    def fits(self, columns: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the step may run on ``columns``.

        The tensors must be on the CPU, have the dtypes of this step and be dense; and those of one parameter must agree
        in shape and, unless they are contiguous, in strides. Each column is taken to live on one device.
        """
        return all([column[0].is_cpu for column in columns if column]) and are_flat(columns, self.dtypes)

    def __call__(self, columns: Sequence[Sequence[Tensor]], coefficients: Mapping[str, float]) -> None:
        params = columns[0]
        pointers = array("Q", map(Tensor.data_ptr, chain.from_iterable(columns)))
        sizes = array("q", map(Tensor.numel, params))
        scalars = array("d", [coefficients[name] for name in self._names])
        self._function(
            len(params),
            pointers.buffer_info()[0],
            sizes.buffer_info()[0],
            scalars.buffer_info()[0],
            0,
            torch.get_num_threads(),
        )
        # autograd must notice, as it does after torch's own steps, if a graph still holds the old parameter
        torch.autograd.graph.increment_version(params)

    def copies(
        self, columns: Sequence[Sequence[Tensor]], coefficients: Mapping[str, float | Tensor]
    ) -> list[list[Tensor]]:
        """New parameters and slots of tensors [K, ...], each copy with coefficients of its own; for a step built out of place.

        Args:
            columns: per name in ``program.tensors``, contiguous tensors [K, ...] without a graph.
            coefficients: per name in ``program.coefficients``, a float or a float64 tensor [K].
        """
        new = [[torch.empty_like(tensor) for tensor in column] for k, column in enumerate(columns) if k != 1]
        count, copies = len(columns[0]), len(columns[0][0])
        lanes = np.arange(copies, dtype=np.uint64)
        addresses = [
            tensor.data_ptr() + lanes * np.uint64(tensor.nbytes // copies)
            for column in (*columns, *new)
            for tensor in column
        ]
        pointers = np.concatenate(addresses)
        sizes = np.repeat(np.array([tensor.numel() // copies for tensor in columns[0]], dtype=np.int64), copies)
        table = np.empty((count, copies, max(1, len(self._names))))
        for k, name in enumerate(self._names):
            table[:, :, k] = np.asarray(coefficients[name])
        self._function(
            len(sizes), pointers.ctypes.data, sizes.ctypes.data, table.ctypes.data, table.shape[2],
            torch.get_num_threads(),
        )  # fmt: skip
        return new
