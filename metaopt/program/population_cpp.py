"""The machine of `metaopt.program.population` in C++, for tensors of a CPU.

``population.cpp`` holds the machine; the operations of `metaopt.program.ops` are put into it. One build serves all programs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from metaopt.program.build import CPP_TYPES, PRELUDE, compiler, load_library
from metaopt.program.cpp import EXTREMA, SERIAL_BELOW
from metaopt.program.encoding import FIRST_MATRIX_OP, OPERATIONS, Code
from metaopt.program.ops import OPS, REDUCTIONS

_MACHINE = Path(__file__).with_name("population.cpp")

_OPERATIONS = """
typedef {type} T;
enum {{ FIRST_REDUCTION = {first_reduction} }};
{extrema}
struct Operand {{
    const T* at;  // null: a number
    T number;
}};
struct Values {{
    const T* at;
    T operator[](const int64_t i) const {{ return at[i]; }}
}};
struct Number {{
    T value;
    T operator[](int64_t) const {{ return value; }}
}};

template <class Use>
static inline void resolved(const Operand& x, const Use use) {{
    if (x.at)
        use(Values{{x.at}});
    else
        use(Number{{x.number}});
}}
template <class F>
static void unary(T* out, const int64_t count, const Operand* x, const F f) {{
    resolved(x[0], [=](const auto a) {{
        INDEPENDENT
        for (int64_t i = 0; i < count; ++i) out[i] = f(a[i]);
    }});
}}
template <class F>
static void binary(T* out, const int64_t count, const Operand* x, const F f) {{
    resolved(x[0], [=](const auto a) {{
        resolved(x[1], [=](const auto b) {{
            INDEPENDENT
            for (int64_t i = 0; i < count; ++i) out[i] = f(a[i], b[i]);
        }});
    }});
}}
template <class F>
static void ternary(T* out, const int64_t count, const Operand* x, const F f) {{
    resolved(x[0], [=](const auto a) {{
        resolved(x[1], [=](const auto b) {{
            resolved(x[2], [=](const auto c) {{
                INDEPENDENT
                for (int64_t i = 0; i < count; ++i) out[i] = f(a[i], b[i], c[i]);
            }});
        }});
    }});
}}

// The sum of part(x), to the rounding of one addition in T: in 16 sums of double, so that compilers can use vectors.
template <class Part>
static T total(const T* x, const int64_t count, const Part part) {{
    double sums[16] = {{}};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int64_t k = 0; k < 16; ++k) sums[k] += double(part(x[i + k]));
    for (; i < count; ++i) sums[i % 16] += double(part(x[i]));
    for (int64_t k = 8; k > 0; k /= 2)
        for (int64_t j = 0; j < k; ++j) sums[j] += sums[j + k];
    return T(sums[0]);
}}
// In the place of all elements of a tensor its number; sizes holds the tensors' elements, side by side in x and in out.
template <class Part, class Finish>
static void by_tensor(T* out, const T* x, const int64_t tensors, const int64_t* sizes, const Part part,
                      const Finish finish) {{
    for (int64_t j = 0; j < tensors; out += sizes[j], x += sizes[j], ++j) {{
        const T number = finish(total(x, sizes[j], part), T(sizes[j]));
        for (int64_t i = 0; i < sizes[j]; ++i) out[i] = number;
    }}
}}

static void execute(const int opcode, T* out, const int64_t count, const Operand* x) {{
    switch (opcode) {{
    {operations}
    }}
}}
static void reduce(const int opcode, const T* x, T* out, const int64_t size, const int64_t tensors, const int64_t* sizes) {{
    switch (opcode) {{
    {reductions}
    }}
}}
"""


class _Launch(ctypes.Structure):
    """``struct Launch`` of population.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "size", "inputs", "outputs", "longest", "registers", "width")),
        ("segments", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sizes", "programs", "instructions", "lengths", "results", "present")),
        *((name, ctypes.c_void_p) for name in ("numbers", "sources", "targets")),
    )


class CppMachine:
    """R runs of `Code`.

    Args:
        code: N programs; those that run have no matrix operations.
        runs: int64 [R] on the CPU, the program of each run.
        sizes: the elements of the tensors in a run's row; None for one.
    """

    def __init__(self, code: Code, runs: Tensor, sizes: Sequence[int] | None) -> None:
        self._sizes = sizes
        self._kept = [it.contiguous() for it in (runs, code.instructions, code.lengths, code.outputs, code.counts)]
        self._launch = _Launch(
            count=len(runs), inputs=code.inputs, outputs=code.outputs.shape[1],
            longest=code.instructions.shape[1], registers=code.registers,
        )  # fmt: skip
        names = ("programs", "instructions", "lengths", "results", "present")
        for name, tensor in zip(names, self._kept, strict=True):
            setattr(self._launch, name, tensor.data_ptr())

    def __call__(self, inputs: Sequence[Tensor], numbers: Tensor, outputs: Sequence[Tensor]) -> bool:
        """From inputs [R, E] to outputs [R, E], which may be the same tensors; numbers are [R, M].

        Returns:
            Whether it was done: not where there is no compiler, or the dtype is neither float32 nor float64.

        Raises:
            MemoryError: no memory for registers.
        """
        library = machine_library(outputs[0].dtype)
        if library is None:
            return False
        size = outputs[0].shape[1]
        sizes = torch.tensor([size] if self._sizes is None else self._sizes)
        sources, targets, numbers = (
            [x.contiguous() for x in inputs],
            [y.contiguous() for y in outputs],
            numbers.contiguous(),
        )
        launch = _Launch.from_buffer_copy(self._launch)  # other threads may call at the same time
        launch.size, launch.width = size, numbers.shape[1]
        launch.segments, launch.sizes, launch.numbers = len(sizes), sizes.data_ptr(), numbers.data_ptr()
        read, written = _addresses(sources), _addresses(targets)
        launch.sources, launch.targets = ctypes.addressof(read), ctypes.addressof(written)
        if library.step(ctypes.byref(launch), torch.get_num_threads()):
            raise MemoryError(f"no memory for registers of runs of {size} elements")
        for output, target in zip(outputs, targets, strict=True):
            if target is not output:
                output.copy_(target)
        return True


def machine_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The machine for tensors of ``dtype``, or None where it cannot be had (`load_library`)."""
    command = compiler()
    if command is None or dtype not in (torch.float32, torch.float64):
        return None
    return _built(dtype, command, os.environ.get("METAOPT_CACHE_DIR"))


@lru_cache(maxsize=16)
def _built(dtype: torch.dtype, command: str, cache: str | None) -> ctypes.CDLL | None:
    """``command`` and ``cache`` are where it comes from (`load_library`)."""
    operations = _OPERATIONS.format(
        type=CPP_TYPES[dtype],
        first_reduction=len(OPS),
        extrema=EXTREMA,
        operations="\n    ".join(f"case {k}: return {_operation(op)};" for k, op in enumerate(OPERATIONS[: len(OPS)])),
        reductions="\n    ".join(
            f"case {k}: return {_reduction(op)};"
            for k, op in enumerate(OPERATIONS[len(OPS) : FIRST_MATRIX_OP], start=len(OPS))
        ),
    )
    machine = _MACHINE.read_text("utf-8").replace("SERIAL_BELOW", str(SERIAL_BELOW))
    library = load_library(PRELUDE + operations + machine)
    if library is not None:
        library.step.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def _operation(op: str) -> str:
    arity = OPS[op].arity
    arguments = ", ".join(f"const T {name}" for name in "abc"[:arity])
    value = OPS[op].cpp.format("(a != 0)" if op == "where" else "a", "b", "c")
    function = ("unary", "binary", "ternary")[arity - 1]
    return f"{function}(out, count, x, []({arguments}) {{ return T({value}); }})"


def _reduction(op: str) -> str:
    reduction = REDUCTIONS[op]
    over = "tensors, sizes" if reduction.over == "tensor" else "1, &size"
    part = f"[](const T x) {{ return {reduction.generated_part.format('x')}; }}"
    finish = f"[](const T total, [[maybe_unused]] const T count) {{ return {reduction.cpp.format('total', 'count')}; }}"
    return f"by_tensor(out, x, {over}, {part}, {finish})"


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
