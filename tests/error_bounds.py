"""How far two correct executions of a Program may lie apart: running error analysis.

Every value travels in float64 together with a bound on the error that an execution in some dtype may have made up to
there (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.3). So the tolerance is per entry, and it is
the problem's own: a division by nearly nothing or a sign of nearly nothing widens it exactly where it occurs, and an
entry whose bound is infinite or NaN says that no execution can be relied on there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.program import Program, Statement

_HALF_ULPS = {"pow": 4, "exp": 4, "log": 4, "tanh": 8, "sin": 4, "cos": 4, "atan": 4}
_ARITHMETIC = 2
"""Two halves cover executions that round twice (a reciprocal and a product for a quotient)."""


@dataclass(frozen=True)
class Bounded:
    """A float64 value and a bound on the error of any execution of it; truth values are 1 and 0."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, value: float | Tensor) -> Bounded:
        value = torch.as_tensor(value, dtype=torch.float64)
        return cls(value, torch.zeros_like(value))


def bounded_step(
    program: Program, tensors: Mapping[str, Bounded], scalars: Mapping[str, float], dtype: torch.dtype
) -> list[Bounded]:
    """The outputs of ``program`` with their bounds, its scalars computed in float64 and its kernel in ``dtype``."""
    values = {name: Bounded.exact(scalars[name]) for name in program.scalars}
    for s in program.prelude:
        values[s.target] = _apply(s, values, torch.float64)
    for name in program.coefficients:
        values[name] = _rounded(values[name], dtype, 1)
    values |= tensors
    for s in program.kernel:
        values[s.target] = _apply(s, values, dtype)
    like = tensors["param"].value
    outputs = [values[out] if isinstance(out, str) else Bounded.exact(out) for out in program.outputs]
    return [Bounded(like * 0 + out.value, like * 0 + out.error) for out in outputs]


def _apply(s: Statement, values: Mapping[str, Bounded], dtype: torch.dtype) -> Bounded:
    args = [values[arg] if isinstance(arg, str) else _rounded(Bounded.exact(arg), dtype, 1) for arg in s.args]
    if s.op in _EXACT:
        return _EXACT[s.op](*args)
    return _rounded(_INEXACT[s.op](*args), dtype, _HALF_ULPS.get(s.op, _ARITHMETIC))


def _rounded(x: Bounded, dtype: torch.dtype, halves: int) -> Bounded:
    info = torch.finfo(dtype)
    step = halves * (info.eps / 2 * x.value.abs() + info.smallest_normal * info.eps)
    return Bounded(x.value, x.error + torch.where(x.value == 0, 0.0, step))


def _times(x: Tensor, y: Tensor) -> Tensor:
    """A product in which an exact 0 wins over infinity."""
    return torch.where((x == 0) | (y == 0), 0.0, x * y)


def _add(x: Bounded, y: Bounded) -> Bounded:
    return Bounded(x.value + y.value, x.error + y.error)


def _sub(x: Bounded, y: Bounded) -> Bounded:
    return Bounded(x.value - y.value, x.error + y.error)


def _mul(x: Bounded, y: Bounded) -> Bounded:
    error = _times(x.value.abs(), y.error) + _times(y.value.abs(), x.error) + _times(x.error, y.error)
    return Bounded(x.value * y.value, error)


def _div(x: Bounded, y: Bounded) -> Bounded:
    value = x.value / y.value
    exact = (x.error == 0) & (y.error == 0)
    lost = (x.error + _times(value.abs(), y.error)) / (y.value.abs() - y.error)
    return Bounded(value, torch.where(exact, 0.0, torch.where(y.error < y.value.abs(), lost, torch.inf)))


def _pow(x: Bounded, y: Bounded) -> Bounded:
    value = x.value**y.value
    slope_x = _times((y.value * x.value ** (y.value - 1)).abs(), x.error)
    slope_y = _times((value * x.value.abs().log()).abs(), y.error)
    exact = (x.error == 0) & ((y.error == 0) | (x.value == 0) | (x.value == 1))
    return Bounded(value, torch.where(exact, 0.0, 2 * (slope_x + slope_y)))


def _monotone(function: Callable[[Tensor], Tensor]) -> Callable[[Bounded], Bounded]:
    def apply(x: Bounded) -> Bounded:
        value = function(x.value)
        below = x.value - x.error
        if function in (torch.sqrt, torch.log):
            below = torch.where(x.value >= 0, below.clamp(min=0), below)
        wide = torch.maximum(function(x.value + x.error) - value, value - function(below))
        return Bounded(value, torch.where(x.error == 0, 0.0, wide))

    return apply


def _steady(function: Callable[[Tensor], Tensor]) -> Callable[[Bounded], Bounded]:
    """Of slopes in [-1, 1]."""
    return lambda x: Bounded(function(x.value), x.error)


def _sign(x: Bounded) -> Bounded:
    return Bounded(torch.sign(x.value), 2.0 * _doubtful(x.value, x.error))


def _extremum(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Bounded, Bounded], Bounded]:
    return lambda x, y: Bounded(function(*torch.broadcast_tensors(x.value, y.value)), torch.maximum(x.error, y.error))


def _compare(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Bounded, Bounded], Bounded]:
    return lambda x, y: Bounded(
        function(x.value, y.value).to(torch.float64), 1.0 * _doubtful(x.value - y.value, x.error + y.error)
    )


def _doubtful(value: Tensor, error: Tensor) -> Tensor:
    return ((error > 0) & ~(value.abs() > error)).to(torch.float64)


def _where(condition: Bounded, x: Bounded, y: Bounded) -> Bounded:
    value = torch.where(condition.value != 0, x.value, y.value)
    error = torch.where(condition.value != 0, x.error, y.error)
    either = (x.value - y.value).abs() + x.error + y.error
    return Bounded(value, torch.where(condition.error > 0, either, error))


_INEXACT: dict[str, Callable[..., Bounded]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "pow": _pow, "sqrt": _monotone(torch.sqrt),
    "exp": _monotone(torch.exp), "log": _monotone(torch.log), "tanh": _monotone(torch.tanh),
    "sin": _steady(torch.sin), "cos": _steady(torch.cos), "atan": _monotone(torch.atan),
}  # fmt: skip
_EXACT: dict[str, Callable[..., Bounded]] = {
    "neg": lambda x: Bounded(-x.value, x.error), "abs": lambda x: Bounded(x.value.abs(), x.error), "sign": _sign,
    "maximum": _extremum(torch.maximum), "minimum": _extremum(torch.minimum), "where": _where,
    "gt": _compare(torch.gt), "lt": _compare(torch.lt), "ge": _compare(torch.ge), "le": _compare(torch.le),
}  # fmt: skip
