"""The closed set of operations of the expression language, with every form that one of them takes.

`OPS` act element by element; `REDUCTIONS` make one number of a tensor, or of all tensors of a tree; `MATRIX_OPS` see a tensor
as a matrix.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt import matrix


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: its name in programs.
        arity: number of arguments.
        plain: on tensors, differentiable, zero-safe.
        scalar: on Python floats.
        python: format string of readable Python.
        cpp: format string of C++ on values of one floating type ``T``.
        triton: format string of Triton on values of one floating type, with the functions of `metaopt_kernels.arithmetic`.
        foreach: suffix of ``torch._foreach_*`` (and of the in-place tensor method), if there is one.
        precedence: of the Python form, for parentheses; 9 = a call or atom.
    """

    name: str
    arity: int
    plain: Callable[..., Any]
    scalar: Callable[..., float]
    python: str
    cpp: str
    triton: str
    foreach: str | None = None
    precedence: int = 9


def _safe_sqrt(x: Any) -> Tensor:
    """sqrt with derivative 0 at 0: one exactly-zero gradient entry must not turn a meta-gradient into NaN.

    Outside autograd (``torch.no_grad``: ES, races) it is the plain op.
    """
    if not torch.is_grad_enabled():
        return torch.sqrt(x)
    positive = x > 0
    root = torch.sqrt(torch.where(positive, x, torch.ones_like(x)))
    return torch.where(positive, root, torch.where(x == 0, torch.zeros_like(x), torch.full_like(x, math.nan)))


def _safe_pow(x: Any, y: Any) -> Any:
    """x**y with derivative 0 where it is infinite: at 0, for exponents between 0 and 1."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled():
        return x**y
    if x.dim() == 0 if isinstance(y, Tensor) else not 0 < y < 1:  # beta**t is no such power, and is on the hot path
        return x**y
    steep = (x == 0) & (y > 0) & (y < 1)
    return torch.where(steep, torch.zeros_like(x), torch.where(steep, torch.ones_like(x), x) ** y)


def _scalar_pow(x: float, y: float) -> float:
    if y == 0.5:  # as torch does: of -inf the power would be inf, and the root is NaN
        return _scalar_sqrt(x)
    try:
        power = x**y
    except (ZeroDivisionError, OverflowError):
        return float(torch.tensor(x, dtype=torch.float64) ** y)
    return math.nan if isinstance(power, complex) else power


def _scalar_sqrt(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def _scalar_log(x: float) -> float:
    return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def _scalar_sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def _scalar_div(x: float, y: float) -> float:
    if y == 0:
        return x * math.copysign(math.inf, y)
    return x / y


def _scalar_exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _of_finite(function: Callable[[float], float]) -> Callable[[float], float]:
    return lambda x: function(x) if math.isfinite(x) else math.nan


def _extremum(torch_op: Callable[..., Tensor]) -> Callable[..., Any]:
    def apply(x: Any, y: Any) -> Any:
        tensor = x if isinstance(x, Tensor) else y
        x, y = (v if isinstance(v, Tensor) else torch.full_like(tensor, v) for v in (x, y))
        return torch_op(x, y)

    return apply


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):  # torch would give float32, or integers
        x = torch.full_like(condition, x, dtype=torch.float64)
    return torch.where(condition, x, y)


def _scalar_extremum(function: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda x, y: math.nan if math.isnan(x) or math.isnan(y) else function(x, y)


def _compare(function: Callable[[Any, Any], Any]) -> Callable[[float, float], float]:
    return lambda x, y: float(function(x, y))


# fmt: off
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("add", 2, operator.add, operator.add, "{0} + {1}", "({0} + {1})", "({0} + {1})", "add", 5),
        Op("sub", 2, operator.sub, operator.sub, "{0} - {1}", "({0} - {1})", "({0} - {1})", "sub", 5),
        Op("mul", 2, operator.mul, operator.mul, "{0} * {1}", "({0} * {1})", "({0} * {1})", "mul", 6),
        Op("div", 2, operator.truediv, _scalar_div, "{0} / {1}", "({0} / {1})", "divide({0}, {1})", "div", 6),
        Op("pow", 2, _safe_pow, _scalar_pow, "{0} ** {1}", "std::pow({0}, {1})", "power({0}, {1})", "pow", 8),
        Op("neg", 1, operator.neg, operator.neg, "-{0}", "(-{0})", "(-1.0 * {0})", "neg", 7),
        Op("abs", 1, torch.abs, abs, "torch.abs({0})", "std::fabs({0})", "tl.abs({0})", "abs"),
        Op("sqrt", 1, _safe_sqrt, _scalar_sqrt, "torch.sqrt({0})", "std::sqrt({0})", "square_root({0})", "sqrt"),
        Op("sign", 1, torch.sign, _scalar_sign, "torch.sign({0})",
           "T(({0} > T(0)) - ({0} < T(0)))", "sign({0})", "sign"),
        Op("exp", 1, torch.exp, _scalar_exp, "torch.exp({0})", "std::exp({0})", "exponential({0})", "exp"),
        Op("log", 1, torch.log, _scalar_log, "torch.log({0})", "std::log({0})", "logarithm({0})", "log"),
        Op("tanh", 1, torch.tanh, math.tanh, "torch.tanh({0})", "std::tanh({0})", "hyperbolic_tangent({0})", "tanh"),
        Op("sin", 1, torch.sin, _of_finite(math.sin), "torch.sin({0})", "std::sin({0})", "sine({0})", "sin"),
        Op("cos", 1, torch.cos, _of_finite(math.cos), "torch.cos({0})", "std::cos({0})", "cosine({0})", "cos"),
        Op("atan", 1, torch.atan, math.atan, "torch.atan({0})", "std::atan({0})", "arctangent({0})", "atan"),
        Op("maximum", 2, _extremum(torch.maximum), _scalar_extremum(max), "torch.maximum({0}, {1})",
           "nan_max({0}, {1})", "maximum({0}, {1})", "maximum"),
        Op("minimum", 2, _extremum(torch.minimum), _scalar_extremum(min), "torch.minimum({0}, {1})",
           "nan_min({0}, {1})", "minimum({0}, {1})", "minimum"),
        Op("gt", 2, operator.gt, _compare(operator.gt), "{0} > {1}", "({0} > {1})", "({0} > {1})", None, 4),
        Op("lt", 2, operator.lt, _compare(operator.lt), "{0} < {1}", "({0} < {1})", "({0} < {1})", None, 4),
        Op("ge", 2, operator.ge, _compare(operator.ge), "{0} >= {1}", "({0} >= {1})", "({0} >= {1})", None, 4),
        Op("le", 2, operator.le, _compare(operator.le), "{0} <= {1}", "({0} <= {1})", "({0} <= {1})", None, 4),
        Op("where", 3, _where, lambda c, x, y: x if c else y, "torch.where({0}, {1}, {2})",
           "({0} ? {1} : {2})", "tl.where({0}, {1}, {2})"),
    )
}
# fmt: on


COMPARISONS = {"gt": ">", "lt": "<", "ge": ">=", "le": "<="}
"""Those of `OPS` that give conditions, with their signs."""


@dataclass(frozen=True)
class Reduction:
    """One number of many: ``finish(sum of part(x) over all elements, how many there are)``.

    Attributes:
        name: its name in programs.
        over: of each tensor by itself, or of all tensors of the tree together.
        part: what is summed, element by element, differentiable.
        finish: of the sum (0-d) and the number of elements; differentiable, zero-safe.
        generated_part: format string of ``part`` in C++ and in Triton.
        cpp: format string of ``finish`` in C++.
        triton: format string of ``finish`` in Triton.
        python: format string of readable Python; of reductions over the tree, with `metaopt.program.trace`'s functions.
    """

    name: str
    over: Literal["tensor", "tree"]
    part: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]
    generated_part: str
    cpp: str
    triton: str
    python: str


def _square(x: Tensor) -> Tensor:
    return x * x


def _same(x: Tensor) -> Tensor:
    return x


# fmt: off
REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction("mean", "tensor", _same, lambda total, count: total / count,
                  "{0}", "({0} / {1})", "divide({0}, {1})", "{0}.mean()"),
        Reduction("norm", "tensor", _square, lambda total, count: _safe_sqrt(total),
                  "({0} * {0})", "std::sqrt({0})", "square_root({0})", "torch.linalg.vector_norm({0})"),
        Reduction("global_sum", "tree", _same, lambda total, count: total, "{0}", "{0}", "{0}", "global_sum({0})"),
        Reduction("global_norm", "tree", _square, lambda total, count: _safe_sqrt(total),
                  "({0} * {0})", "std::sqrt({0})", "square_root({0})", "global_norm({0})"),
    )
}
# fmt: on
"""Of element values only: a number has no elements to be summed."""


@dataclass(frozen=True)
class MatrixOp:
    """A function of a tensor as a matrix (`metaopt.matrix.as_matrix`), by torch alone: no generated code has it.

    Attributes:
        plain: on one tensor, differentiable; its name is the one in programs and in Python.
        counts: gives one number of the tensor, else a tensor of the same shape.
    """

    plain: Callable[[Tensor], Tensor]
    counts: bool = False


MATRIX_OPS: dict[str, MatrixOp] = {
    op.plain.__name__: op
    for op in (
        MatrixOp(matrix.orthogonalise),
        MatrixOp(matrix.row_mean),
        MatrixOp(matrix.column_mean),
        MatrixOp(matrix.row_count, counts=True),
        MatrixOp(matrix.column_count, counts=True),
    )
}
"""Of element values only, as reductions are."""
