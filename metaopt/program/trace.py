"""Turn the text of an `ElementwiseRule` into a `Program` by running it once on symbols."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Never

import torch

from metaopt.objective import Objective
from metaopt.program.ops import MATRIX_OPS, OPS, REDUCTIONS
from metaopt.program.program import Arg, Program, Statement
from metaopt.rule import Declared, ElementwiseRule, HyperValues, flat_hp
from metaopt.space import Hyper, declarations


class TraceError(TypeError):
    """The text of a rule uses something outside the expression language."""


_TORCH_NAMES = {
    "add": "add", "sub": "sub", "subtract": "sub", "mul": "mul", "multiply": "mul", "div": "div", "divide": "div",
    "true_divide": "div", "pow": "pow", "neg": "neg", "negative": "neg", "abs": "abs", "absolute": "abs", "sqrt": "sqrt",
    "sign": "sign", "exp": "exp", "log": "log", "tanh": "tanh", "sin": "sin", "cos": "cos",
    "atan": "atan", "arctan": "atan", "maximum": "maximum", "minimum": "minimum",
    "where": "where", "gt": "gt", "greater": "gt", "lt": "lt", "less": "lt", "ge": "ge", "greater_equal": "ge",
    "le": "le", "less_equal": "le",
}  # fmt: skip
_REDUCTION_NAMES = {
    "mean": "mean", "norm": "norm", "linalg_vector_norm": "norm", "global_sum": "global_sum", "global_norm": "global_norm"
}  # fmt: skip
_ARITIES = {
    "square": 1, "reciprocal": 1, "rsqrt": 1, "lerp": 3, "addcmul": 3, "addcdiv": 3, "zeros_like": 1, "ones_like": 1,
    "relu": 1, "sigmoid": 1, "softplus": 1, "logsigmoid": 1, "log_sigmoid": 1, "log1p": 1, "expm1": 1,
}  # fmt: skip
_KEYWORDS = {
    "clamp": ("min", "max"), "clip": ("min", "max"), "addcmul": ("value",), "addcdiv": ("value",),
    "add": ("alpha",), "sub": ("alpha",), "subtract": ("alpha",),
}  # fmt: skip
TRACEABLE = tuple(sorted({*_TORCH_NAMES, *_ARITIES, *_KEYWORDS}))
"""The torch functions and tensor methods that a rule may use element by element; docs/architecture.md lists them."""

_WHOLE: dict[str, tuple[Any, ...]] = {"dim": (None,), "keepdim": (False,), "out": (None,), "dtype": (None,)}
_SAYING_NOTHING = {"mean": _WHOLE, "norm": {"p": (2, "fro"), **_WHOLE}, "linalg_vector_norm": {"ord": (2,), **_WHOLE}}
"""Arguments of reductions, in torch's order, with the values that change nothing: ``torch.norm`` hands all of them on."""

_REDUCTIONS = (
    "of a whole tensor there are x.norm() and x.mean(), of all tensors together global_norm(x) and global_sum(x) "
    "(of metaopt.program), "
    f"of a matrix (of metaopt.matrix) {', '.join(f'{name}(x)' for name in MATRIX_OPS)}"
)


class Symbol:
    """A value under tracing; operators and torch functions on it append statements."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer = tracer
        self._name = name

    def __repr__(self) -> str:
        return f"<symbol {self._name}>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        symbol = next((arg for arg in args if isinstance(arg, Symbol)), None)
        if symbol is None:  # in a list, as of torch.stack
            raise _outside(name)
        return symbol._tracer.call(name, args, kwargs or {})

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name.startswith("_"):
            raise AttributeError(name)
        if not callable(getattr(torch.Tensor, name, None)):  # shape, dtype, a misspelling
            raise _outside(name)
        return lambda *args, **kwargs: self._tracer.call(name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        raise TraceError(
            "a branch (if, and, or, not) cannot depend on a tensor, a hyperparameter or t, which have no values while "
            "tracing; write torch.where(condition, x, y), or metaopt.where of numbers, or make it an option()"
        )

    def __float__(self) -> float:
        raise TraceError(f"{self._name} has no value while tracing; use operators and torch functions only")

    def __eq__(self, other: object) -> Never:
        raise TraceError("an elementwise rule has no == and no !=; write (x >= y) * (x <= y), which is 1 or 0")

    __ne__ = __eq__

    def __getitem__(self, *index_and_value: object) -> Never:
        raise TraceError(
            "x[...] takes elements apart, and an elementwise rule does the same to all; "
            "write x = torch.where(condition, new, x)"
        )

    __setitem__ = __getitem__

    def __hash__(self) -> int:
        return id(self)

    def __neg__(self) -> Symbol:
        return self._tracer.emit("neg", self)

    def __abs__(self) -> Symbol:
        return self._tracer.emit("abs", self)


def _binary(op: str, swapped: bool = False) -> Callable[[Symbol, Any], Symbol]:
    def method(self: Symbol, other: Any) -> Symbol:
        return self._tracer.emit(op, other, self) if swapped else self._tracer.emit(op, self, other)

    return method


for _op, _dunder in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("div", "truediv"), ("pow", "pow")):
    setattr(Symbol, f"__{_dunder}__", _binary(_op))
    setattr(Symbol, f"__r{_dunder}__", _binary(_op, swapped=True))
for _op in ("gt", "lt", "ge", "le"):
    setattr(Symbol, f"__{_op}__", _binary(_op))


class Tracer:
    """Collects the statements that operations on its symbols append; equal ones are one.

    Attributes:
        inputs: names that no statement may take.
        statements: in order.
    """

    def __init__(self, inputs: Collection[str]) -> None:
        self.inputs = inputs
        self.statements: list[Statement] = []
        self._known: dict[tuple[str, ...], Symbol] = {}  # common subexpressions

    def arg(self, value: Any) -> Arg:
        """A number or symbol as statements have it."""
        if isinstance(value, Symbol):
            return value._name
        if isinstance(value, (int, float)):
            return float(value)
        raise TraceError(
            f"{value!r} is neither a number nor a traced value; an elementwise rule works on its arguments"
        )

    def emit(self, op: str, *args: Any) -> Symbol:
        """The value of ``op(*args)``."""
        names = tuple(self.arg(a) for a in args)
        key = op, *map(repr, names)  # 0.0 == -0.0
        if key not in self._known:
            target = f"v{len(self.statements)}"
            while target in self.inputs:
                target += "_"
            self.statements.append(Statement(target, op, names))
            self._known[key] = Symbol(self, target)
        return self._known[key]

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        """A torch function or tensor method, by name."""
        if name.endswith("_") and not name.startswith("__"):
            raise TraceError(
                f"{name} works in place; an elementwise rule is pure: write x = x.{name[:-1]}(...) and return x"
            )
        name = name.strip("_")
        if name in _ARITIES and len(args) != _ARITIES[name]:
            raise TraceError(f"{name} takes {_ARITIES[name]} arguments, got {len(args)}")
        unknown = kwargs.keys() - _KEYWORDS.get(name, ())
        if unknown and name in TRACEABLE:
            raise TraceError(f"{name} takes no {min(unknown)}= in an elementwise rule; write the arithmetic out")
        if name == "square":
            return self.emit("mul", args[0], args[0])
        if name == "reciprocal":
            return self.emit("div", 1.0, args[0])
        if name == "rsqrt":
            return self.emit("div", 1.0, self.emit("sqrt", args[0]))
        if name == "lerp":
            start, end, weight = args
            return self.emit("add", start, self.emit("mul", weight, self.emit("sub", end, start)))
        if name in ("clamp", "clip"):
            if not 1 <= len(args) <= 3:
                raise TraceError(f"{name} takes a value and two bounds, got {len(args)} arguments")
            low = kwargs.get("min", args[1] if len(args) > 1 else None)
            high = kwargs.get("max", args[2] if len(args) > 2 else None)
            value = args[0] if low is None else self.emit("maximum", args[0], low)
            return value if high is None else self.emit("minimum", value, high)
        if name in ("addcmul", "addcdiv"):
            product = self.emit("mul" if name == "addcmul" else "div", args[1], args[2])
            return self.emit("add", args[0], self.emit("mul", kwargs.get("value", 1.0), product))
        if name in ("zeros_like", "ones_like"):
            ones = self.emit("pow", args[0], 0.0)  # also where it is NaN
            return ones if name == "ones_like" else self.emit("mul", 0.0, ones)
        if name == "log1p":
            return self.emit("log", self.emit("add", 1.0, args[0]))
        if name == "expm1":
            return self.emit("sub", self.emit("exp", args[0]), 1.0)
        if name in ("relu", "sigmoid", "softplus", "logsigmoid", "log_sigmoid"):
            return activation(self.emit, name, args[0])
        if name in _REDUCTION_NAMES:
            return self._reduction(name, args, kwargs)
        if name in MATRIX_OPS:
            if len(args) != 1 or kwargs:
                raise TraceError(f"{name} takes one value and nothing else")
            return self.emit(name, args[0])
        if name not in _TORCH_NAMES:
            raise _outside(name)
        op = _TORCH_NAMES[name]
        if len(args) != OPS[op].arity:
            raise TraceError(f"{name} takes {OPS[op].arity} arguments, got {len(args)}")
        if "alpha" in kwargs:
            return self.emit(op, args[0], self.emit("mul", kwargs["alpha"], args[1]))
        return self.emit(op, *args)

    def _reduction(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        harmless = _SAYING_NOTHING.get(name, {})
        if not 1 <= len(args) <= 1 + len(harmless):
            raise TraceError(f"{name} takes one value, got {len(args)}")
        for key, value in {**dict(zip(harmless, args[1:], strict=False)), **kwargs}.items():
            if isinstance(value, Symbol) or value not in harmless.get(key, ()):
                raise TraceError(f"{name} takes no {key}={value!r} in an elementwise rule: {_REDUCTIONS}")
        return self.emit(_REDUCTION_NAMES[name], args[0])


def activation(emit: Callable[..., Any], name: str, x: Any) -> Any:
    """``relu``, ``sigmoid``, ``softplus`` or ``logsigmoid`` of x in statements.

    In forms whose values and derivatives are finite for every finite x, and right at 0.
    """
    if name == "relu":  # of derivative 0 at 0, as torch has it
        return emit("where", emit("le", x, 0.0), 0.0, x)
    tail = emit("add", 1.0, emit("exp", emit("neg", emit("abs", x))))  # 1 + e^-|x|
    if name == "sigmoid":
        return emit("div", emit("exp", emit("minimum", x, 0.0)), tail)
    if name == "softplus":
        return emit("add", emit("maximum", x, 0.0), emit("log", tail))
    return emit("sub", emit("minimum", x, 0.0), emit("log", tail))


def _outside(name: str) -> TraceError:
    return TraceError(
        f"{name} is not elementwise arithmetic: {_REDUCTIONS}; element by element an elementwise rule may use "
        f"+ - * / **, < <= > >=, {', '.join(TRACEABLE)}"
    )


class _OptionsOnly:
    """``self`` while tracing: options and helper methods may be read, hyperparameters may not."""

    def __init__(self, rule: Declared) -> None:
        object.__setattr__(self, "_rule", rule)

    def __getattr__(self, name: str) -> Any:
        rule = object.__getattribute__(self, "_rule")
        if isinstance(declarations(type(rule)).get(name), Hyper):
            raise TraceError(
                f"the text of {type(rule).__name__} reads self.{name}; take {name} as an argument, "
                "so that it can differ between copies and be differentiated"
            )
        value = getattr(type(rule), name, None)
        return value.__get__(self) if callable(value) and not isinstance(value, type) else getattr(rule, name)


def where(condition: Any, x: Any, y: Any) -> Any:
    """``x if condition else y`` for floats, tensors and traced values: the branch to use on ``t`` and coefficients."""
    if isinstance(condition, Symbol):
        return condition._tracer.emit("where", condition, x, y)
    if isinstance(condition, torch.Tensor):
        return OPS["where"].plain(condition, x, y)
    return x if condition else y


def global_sum(x: Any) -> Any:
    """The sum of a value over all elements of all tensors together; a tensor that comes alone is all there are."""
    return x._tracer.emit("global_sum", x) if isinstance(x, Symbol) else _alone("global_sum", x)


def global_norm(x: Any) -> Any:
    """The Euclidean norm of a value over all elements of all tensors together; see `global_sum`."""
    return x._tracer.emit("global_norm", x) if isinstance(x, Symbol) else _alone("global_norm", x)


def _alone(name: str, x: torch.Tensor) -> torch.Tensor:
    reduction = REDUCTIONS[name]
    return reduction.finish(reduction.part(x).sum(), x.numel())


def trace(rule: ElementwiseRule) -> Program:
    """The program of ``rule``; depends on its options, not on its hyperparameters. Prefer ``rule.program``, which keeps it.

    Raises:
        TraceError: the text leaves the expression language (names the line, the offence and the way out).
    """
    cls, self = type(rule), _OptionsOnly(rule)
    structure = _structure(rule.hp)
    scalars = (*flat_hp(structure).values(), "t")
    tensors = ("param", "grad", *_checked_slots(rule, scalars))
    tracer = Tracer({*scalars, *tensors})
    arguments = [Symbol(tracer, name) for name in tensors]
    with _Places(cls.__name__):
        coefficients = cls.coefficients(self, _symbols(tracer, structure), Symbol(tracer, "t"))  # type: ignore[arg-type]
        with _LocalNames(cls.elementwise) as names:
            outputs = cls.elementwise(self, *arguments, **coefficients)  # type: ignore[arg-type]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if len(outputs) != 1 + len(rule.slots):
        expected = ", ".join(["new_param", *(f"new_{slot}" for slot in rule.slots)])
        raise TraceError(f"{cls.__name__}.elementwise must return ({expected}), got {len(outputs)} values")
    program = Program(scalars, tensors, tuple(tracer.statements), tuple(tracer.arg(o) for o in outputs))
    chosen = {s._name: name for name, s in coefficients.items() if isinstance(s, Symbol)}
    return renamed(without_dead(program), {**names.found, **chosen})


def trace_objective(objective: Objective) -> Program:
    """The program of an objective whose text is of this language; prefer ``objective.program``, which keeps it.

    Raises:
        TraceError: the text leaves the expression language, as does what depends on other examples otherwise than by ``mean()``
            and ``norm()``, or it gives more than one value.
    """
    cls, structure = type(objective), _structure(objective.hp)
    scalars = (*flat_hp(structure).values(),)
    tracer = Tracer({*scalars, *objective.inputs})
    arguments = [Symbol(tracer, name) for name in objective.inputs]
    with _Places(cls.__name__), _LocalNames(cls.loss) as names:
        loss = cls.loss(_OptionsOnly(objective), *arguments, **_symbols(tracer, structure))  # type: ignore[arg-type]
    if isinstance(loss, tuple):
        raise TraceError(f"{cls.__name__}.loss must return one value per example, got {len(loss)} values")
    program = Program(scalars, objective.inputs, tuple(tracer.statements), (tracer.arg(loss),))
    return renamed(without_dead(program), names.found)


def _structure(hp: HyperValues) -> dict[str, Any]:
    """Hyperparameter -> the names of its numbers in programs."""
    return {
        name: tuple(f"{name.removesuffix('s')}{i + 1}" for i in range(len(value))) if isinstance(value, tuple) else name
        for name, value in hp.items()
    }


def _symbols(tracer: Tracer, structure: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(Symbol(tracer, n) for n in names) if isinstance(names, tuple) else Symbol(tracer, names)
        for name, names in structure.items()
    }


class _Places:
    """Adds to a `TraceError` which line of the user's method it came from."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, at: TracebackType | None) -> None:
        if (
            isinstance(error, TraceError) and at is not None and at.tb_next is not None
        ):  # the frame of the user's method
            place = f"line {at.tb_next.tb_lineno} of {Path(at.tb_next.tb_frame.f_code.co_filename).name}"
            error.args = (f"{self._owner}, {place}: {error}",)


def _checked_slots(rule: ElementwiseRule, scalars: tuple[str, ...]) -> tuple[str, ...]:
    slots, taken = rule.slots, {"param", "grad", "step", *scalars}
    if not isinstance(slots, tuple):
        raise TraceError(
            f'slots of {type(rule).__name__} must be a tuple of names, got {slots!r}; write slots = ("name",)'
        )
    for slot in slots:
        if not isinstance(slot, str) or not slot.isidentifier() or slot in taken or slots.count(slot) > 1:
            raise TraceError(
                f"slot {slot!r} of {type(rule).__name__} must be a new identifier, none of {', '.join(sorted(taken))}"
            )
    return slots


class _LocalNames:
    """Collects the local variable names that a traced function gave its values, for readable source."""

    def __init__(self, function: Any) -> None:
        self._code = function.__code__
        self.found: dict[str, str] = {}

    def _profile(self, frame: Any, event: str, arg: Any) -> None:
        if event == "return" and frame.f_code is self._code:
            for name, value in frame.f_locals.items():
                if isinstance(value, Symbol):
                    self.found.setdefault(value._name, name)

    def __enter__(self) -> _LocalNames:
        self._previous: Any = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exception: object) -> None:
        if hasattr(self._previous, "enable"):  # of cProfile, whose profiler is no function
            self._previous.enable()
        else:
            sys.setprofile(self._previous)


def without_dead(program: Program) -> Program:
    """``program`` without the statements that no output depends on."""
    live = set(program.outputs)
    kept = []
    for s in reversed(program.statements):
        if s.target in live:
            kept.append(s)
            live |= set(s.args)
    return Program(program.scalars, program.tensors, tuple(reversed(kept)), program.outputs)


def renamed(program: Program, names: dict[str, str]) -> Program:
    """Give statements the author's names; a name that is taken gets ``new_`` or a number."""
    taken = {*program.scalars, *program.tensors, "global_sum", "global_norm", *MATRIX_OPS}  # which source calls
    mapping: dict[Arg, str] = {}
    for s in program.statements:
        complement = s.op == "sub" and s.args[0] == 1.0 and s.args[1] in program.scalars
        wanted = names.get(s.target, f"one_minus_{s.args[1]}" if complement else s.target)
        if s.target not in names and not complement:  # nobody's name gives way to one that was made up
            numbered = (f"v{k}" for k in count(len(program.statements)))
            candidates, refused = chain([wanted], numbered), {*taken, *names.values()}
        else:
            candidates, refused = chain([wanted, f"new_{wanted}"], (f"{wanted}_{k}" for k in count(2))), taken
        mapping[s.target] = next(name for name in candidates if name not in refused)
        taken.add(mapping[s.target])

    def arg(a: Arg) -> Arg:
        return mapping.get(a, a)

    statements = tuple(Statement(mapping[s.target], s.op, tuple(arg(a) for a in s.args)) for s in program.statements)
    return Program(program.scalars, program.tensors, statements, tuple(arg(o) for o in program.outputs))
