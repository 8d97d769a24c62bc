"""The functions that a search writes programs with, and what each becomes in the engine's `Program`.

The paper's (Chen et al., 2023, https://arxiv.org/abs/2302.06675): 3 constants, 29 of one argument, 12 of two or three. Its
forty-fifth, ``invert``, is bitwise, which floating-point numbers have not. Domains are protected where its code protects them:

- ``log``, ``log2``, ``log10`` and ``sqrt`` are of |x|, ``log1p`` is log|1 + x|; ``div(x, y)`` is x / (y + 1e-8);
- elsewhere numbers are what IEEE arithmetic makes of them: ``arcsin(2)`` is NaN, ``reciprocal(0)`` infinity.

``norm`` is of each tensor by itself; ``global_norm``, ``dot``, ``cosine_sim`` and ``clip_by_global_norm`` are of all tensors of
the tree together. Beyond the paper there are `EXTRAS`: what traced rules need (division and roots as they are, comparisons), so
that any of them can start a search, and what losses are made of; and functions of `MATRICES`, where a vector is a matrix of one
row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from metaopt.program.ops import MATRIX_OPS
from metaopt.program.program import Arg
from metaopt.program.trace import activation

Emit = Callable[..., Arg]
"""``emit(op, *args)``: append a statement of the engine's language (or find the same one) and return its name."""


class Kind(IntEnum):
    """What a variable holds: nothing yet, a number for all, a number for each tensor or tree, an element for each."""

    UNDEFINED = 0
    SCALAR = 1
    NUMBER = 2
    TENSOR = 3


@dataclass(frozen=True)
class Function:
    """A function of the search language.

    The kind of its value is the largest kind of its arguments, and `Kind.NUMBER` for reductions.

    Attributes:
        name: in programs.
        arity: how many arguments, 0 to 3.
        expand: ``expand(emit, *args)`` gives its value in the engine's language.
        reduces: makes a number of tensors.
        of_tensors: how many of the first arguments must be tensors.
        commutes: in its first two arguments.
    """

    name: str
    arity: int
    expand: Callable[..., Arg]
    reduces: bool = False
    of_tensors: int = 0
    commutes: bool = False


EPS = 1e-8
"""What ``div`` adds to its divisor, and the value of ``get_eps``."""


def _op(name: str) -> Callable[..., Arg]:
    return lambda emit, *args: emit(name, *args)


def _activation(name: str) -> Callable[..., Arg]:
    return lambda emit, x: activation(emit, name, x)


def _log_abs(e: Emit, x: Arg) -> Arg:
    return e("log", e("abs", x))


def _root(e: Emit, x: Arg) -> Arg:
    return e("sqrt", e("abs", x))


def _divide(e: Emit, x: Arg, y: Arg) -> Arg:
    return e("div", x, e("add", y, EPS))


def _square(e: Emit, x: Arg) -> Arg:
    return e("mul", x, x)


def _arcsin(e: Emit, x: Arg) -> Arg:
    return e("atan", e("div", x, e("sqrt", e("sub", 1.0, _square(e, x)))))


def _hyperbolic(op: str) -> Callable[..., Arg]:
    return lambda e, x: e("mul", 0.5, e(op, e("exp", x), e("exp", e("neg", x))))


def _arcsinh(e: Emit, x: Arg) -> Arg:
    # of |x|, whose terms do not cancel
    return e("mul", e("sign", x), e("log", e("add", e("abs", x), e("sqrt", e("add", _square(e, x), 1.0)))))


def _arccosh(e: Emit, x: Arg) -> Arg:
    return e("log", e("add", x, e("sqrt", e("sub", _square(e, x), 1.0))))


def _arctanh(e: Emit, x: Arg) -> Arg:
    return e("mul", 0.5, e("log", e("div", e("add", 1.0, x), e("sub", 1.0, x))))


def _cbrt(e: Emit, x: Arg) -> Arg:
    return e("mul", e("sign", x), e("pow", e("abs", x), 1 / 3))


def _interpolate(e: Emit, x: Arg, y: Arg, weight: Arg) -> Arg:
    return e("add", e("mul", e("sub", 1.0, weight), x), e("mul", weight, y))


def _dot(e: Emit, x: Arg, y: Arg) -> Arg:
    return e("global_sum", e("mul", x, y))


def _cosine(e: Emit, x: Arg, y: Arg) -> Arg:
    return _divide(e, _dot(e, x, y), e("mul", e("global_norm", x), e("global_norm", y)))


def _clip(e: Emit, x: Arg, bound: Arg) -> Arg:
    return e("mul", x, e("minimum", 1.0, _divide(e, bound, e("global_norm", x))))


def _table(*functions: Function) -> dict[str, Function]:
    return {function.name: function for function in functions}


PAPER: dict[str, Function] = _table(
    Function("get_pi", 0, lambda e: math.pi),
    Function("get_e", 0, lambda e: math.e),
    Function("get_eps", 0, lambda e: EPS),
    Function("abs", 1, _op("abs")),
    Function("cos", 1, _op("cos")),
    Function("sin", 1, _op("sin")),
    Function("tan", 1, lambda e, x: e("div", e("sin", x), e("cos", x))),
    Function("arcsin", 1, _arcsin),
    Function("arccos", 1, lambda e, x: e("sub", math.pi / 2, _arcsin(e, x))),
    Function("arctan", 1, _op("atan")),
    Function("sinh", 1, _hyperbolic("sub")),
    Function("cosh", 1, _hyperbolic("add")),
    Function("tanh", 1, _op("tanh")),
    Function("arcsinh", 1, _arcsinh),
    Function("arccosh", 1, _arccosh),
    Function("arctanh", 1, _arctanh),
    Function("exp", 1, _op("exp")),
    Function("exp2", 1, lambda e, x: e("exp", e("mul", x, math.log(2)))),
    Function("exp10", 1, lambda e, x: e("exp", e("mul", x, math.log(10)))),
    Function("expm1", 1, lambda e, x: e("sub", e("exp", x), 1.0)),
    Function("log", 1, _log_abs),
    Function("log10", 1, lambda e, x: e("mul", _log_abs(e, x), 1 / math.log(10))),
    Function("log2", 1, lambda e, x: e("mul", _log_abs(e, x), 1 / math.log(2))),
    Function("log1p", 1, lambda e, x: _log_abs(e, e("add", 1.0, x))),
    Function("square", 1, _square),
    Function("sqrt", 1, _root),
    Function("cube", 1, lambda e, x: e("mul", _square(e, x), x)),
    Function("cbrt", 1, _cbrt),
    Function("sign", 1, _op("sign")),
    Function("reciprocal", 1, lambda e, x: e("div", 1.0, x)),
    Function("norm", 1, _op("norm"), reduces=True, of_tensors=1),
    Function("negative", 1, _op("neg")),
    Function("global_norm", 1, _op("global_norm"), reduces=True, of_tensors=1),
    Function("interpolate", 3, _interpolate),
    Function("dot", 2, _dot, reduces=True, of_tensors=2, commutes=True),
    Function("cosine_sim", 2, _cosine, reduces=True, of_tensors=2, commutes=True),
    Function("clip_by_global_norm", 2, _clip, of_tensors=1),
    Function("power", 2, _op("pow")),
    Function("add", 2, _op("add"), commutes=True),
    Function("sub", 2, _op("sub")),
    Function("mul", 2, _op("mul"), commutes=True),
    Function("div", 2, _divide),
    Function("max", 2, _op("maximum"), commutes=True),
    Function("min", 2, _op("minimum"), commutes=True),
)
"""The paper's functions."""

EXTRAS: dict[str, Function] = _table(
    Function("copy", 1, lambda e, x: x),
    Function("exact_div", 2, _op("div")),
    Function("exact_sqrt", 1, _op("sqrt")),
    Function("exact_log", 1, _op("log")),
    Function("gt", 2, _op("gt")),
    Function("lt", 2, _op("lt")),
    Function("ge", 2, _op("ge")),
    Function("le", 2, _op("le")),
    Function("where", 3, _op("where")),
    Function("mean", 1, _op("mean"), reduces=True, of_tensors=1),
    Function("global_sum", 1, _op("global_sum"), reduces=True, of_tensors=1),
    Function("relu", 1, _activation("relu")),
    Function("sigmoid", 1, _activation("sigmoid")),
    Function("logsigmoid", 1, _activation("logsigmoid")),
    Function("clip", 2, lambda e, x, bound: e("maximum", e("minimum", x, bound), e("neg", bound))),
)
"""Beyond the paper; a search inserts them when asked to."""

MATRICES: dict[str, Function] = _table(
    *(Function(name, 1, _op(name), reduces=op.counts, of_tensors=1) for name, op in MATRIX_OPS.items())
)
"""Of a tensor as a matrix (`metaopt.matrix`): what rules such as Muon and Adafactor are made of."""

FUNCTIONS: dict[str, Function] = PAPER | EXTRAS | MATRICES
NUMBER_OF = {name: k for k, name in enumerate(FUNCTIONS)}
"""A function's number in arrays of programs."""

LOSSES = (
    "logsigmoid", "sigmoid", "relu", "tanh", "exp", "log1p", "sqrt", "square", "abs", "negative", "sign", "arctan", "add",
    "sub", "mul", "div", "max", "min",
)  # fmt: skip
"""What losses are made of, and other closed forms."""

INSERTED = {
    "paper": tuple(PAPER), "all": tuple(PAPER | EXTRAS), "matrix": tuple(PAPER | MATRICES), "losses": LOSSES
}  # fmt: skip
"""What inserted statements call, by the option ``functions`` of a searcher."""

OF_OPERATION = {
    "maximum": "max", "minimum": "min", "neg": "negative", "pow": "power", "div": "exact_div", "sqrt": "exact_sqrt",
    "log": "exact_log", "atan": "arctan",
}  # fmt: skip
"""Which function is an operation of the engine's language, where their names differ."""
