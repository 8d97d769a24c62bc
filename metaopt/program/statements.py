"""Programs as JSON statements: the form that language models keep to best, because a server can hold them to its schema.

A statement is ``{"o": "x", "f": "mul", "a": "beta", "b": "rho", "c": null}``: the name ``x`` becomes ``mul(beta, rho)``.
Operands are names and numbers; a name may be assigned again, and what reads it gets its latest value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaopt.program.loss_trace import STATISTICS, LossTracer, loss_program
from metaopt.program.ops import MATRIX_OPS, OPS, REDUCTIONS
from metaopt.program.parse import LONGEST, LONGEST_LOSS, ProgramTextError, parse_loss
from metaopt.program.program import Arg, Program
from metaopt.program.trace import Symbol, TraceError, Tracer, renamed, without_dead

MOST_STATEMENTS = 64
_OPERANDS = ("a", "b", "c")
_ELEMENTWISE = {name: op.arity for name, op in OPS.items()} | dict.fromkeys(
    ("square", "reciprocal", "rsqrt", "relu", "sigmoid", "softplus", "logsigmoid", "log1p", "expm1"), 1
)
_OF_RULES = _ELEMENTWISE | dict.fromkeys((*REDUCTIONS, *MATRIX_OPS), 1)
_OF_LOSSES = _ELEMENTWISE | dict.fromkeys(STATISTICS, 1)
"""Arities of the functions by name."""


def loss_statements_schema(tensors: Sequence[str], scalars: Sequence[str]) -> dict[str, Any]:
    """JSON Schema of what `read_loss` takes as statements; of the same inputs."""
    return _schema((*tensors, *scalars), ("loss",), _OF_LOSSES)


def rule_statements_schema(slots: Sequence[str], scalars: Sequence[str]) -> dict[str, Any]:
    """JSON Schema of what `read_rule_statements` takes; of the same slots and scalars."""
    return _schema(("param", "grad", *slots, *scalars), ("param", *slots), _OF_RULES)


def _schema(inputs: Sequence[str], outputs: Sequence[str], functions: Mapping[str, int]) -> dict[str, Any]:
    local = [f"x{k}" for k in range(1, 17)]
    targets = list(dict.fromkeys([*local, *outputs]))
    operand = {"anyOf": [{"type": "number"}, {"enum": list(dict.fromkeys([*inputs, *targets]))}]}
    optional = {"anyOf": [*operand["anyOf"], {"type": "null"}]}
    properties = {"o": {"enum": targets}, "f": {"enum": sorted(functions)}, "a": operand, "b": optional, "c": optional}
    statement = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip
    return {"type": "array", "items": statement, "minItems": 1, "maxItems": MOST_STATEMENTS}


def read_loss(text: str, tensors: Sequence[str], scalars: Sequence[str]) -> Program:
    """The program of a loss, from statements in JSON that assign ``loss``, or from Python (`metaopt.program.parse_loss`).

    Args:
        text: a JSON list of statements, a JSON object that has it as ``program``, or a Python function.
        tensors: names of what the loss is of: one element per example each.
        scalars: names of its numbers.

    Returns:
        A program over all of ``tensors`` and ``scalars`` with the loss, one value per example, as its output.

    Raises:
        ProgramTextError: anything else.
    """
    if not text.lstrip().startswith(("[", "{")):
        return parse_loss(text, tensors, scalars)
    tracer = LossTracer({*tensors, *scalars})
    values, names = _run(_statements(text, LONGEST_LOSS), tracer, (*tensors, *scalars), _OF_LOSSES)
    if "loss" not in values:
        raise ProgramTextError('no statement assigns the result; end with {"o": "loss", ...}')
    try:
        return loss_program(tracer, tuple(tensors), tuple(scalars), values["loss"], names)
    except ValueError as error:
        raise ProgramTextError(str(error)) from None


def read_rule_statements(text: str, slots: Sequence[str], scalars: Sequence[str]) -> Program:
    """The program of a rule, from statements in JSON that assign ``param`` and the slots anew.

    Args:
        text: a JSON list of statements, or a JSON object that has it as ``program``.
        slots: names of the state, each a tensor like the parameter.
        scalars: names of the hyperparameters, and ``t``.

    Raises:
        ProgramTextError: anything else.
    """
    tensors = ("param", "grad", *slots)
    tracer = Tracer({*tensors, *scalars})
    values, names = _run(_statements(text, LONGEST), tracer, (*tensors, *scalars), _OF_RULES)
    outputs = tuple(tracer.arg(values[name]) for name in ("param", *slots))
    try:
        program = Program(tuple(scalars), tensors, tuple(tracer.statements), outputs)
    except ValueError as error:
        raise ProgramTextError(str(error)) from None
    return renamed(without_dead(program), names)


def _statements(text: str, longest: int) -> list[Any]:
    if len(text) > 4 * longest:  # names and brackets around each operand
        raise ProgramTextError(f"statements may have {4 * longest} characters, got {len(text)}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProgramTextError(f"no JSON: {error}") from None
    statements = found.get("program") if isinstance(found, dict) else found
    if not isinstance(statements, list) or not 1 <= len(statements) <= MOST_STATEMENTS:
        raise ProgramTextError(f"the program must be a list of 1 to {MOST_STATEMENTS} statements")
    return statements


def _run(
    statements: list[Any], tracer: Tracer, inputs: Sequence[str], functions: Mapping[str, int]
) -> tuple[dict[str, Symbol], dict[str, str]]:
    """The last value of each name, and the names of the traced statements."""
    values = {name: Symbol(tracer, name) for name in inputs}
    names: dict[str, str] = {}
    for k, statement in enumerate(statements):
        try:
            target, function, operands = _parts(statement, functions)
            value = tracer.call(function, tuple(_operand(operand, values) for operand in operands), {})
        except (ProgramTextError, TraceError) as error:
            raise ProgramTextError(f"statement {k + 1}: {error}") from None
        values[target] = value
        names.setdefault(value._name, target)
    return values, names


def _parts(statement: Any, functions: Mapping[str, int]) -> tuple[str, str, list[Any]]:
    if not isinstance(statement, dict) or not {"o", "f"} <= statement.keys() <= {"o", "f", *_OPERANDS}:
        raise ProgramTextError('a statement is {"o": name, "f": function, "a": operand, "b": ..., "c": ...}')
    target, function = statement["o"], statement["f"]
    if not isinstance(target, str) or not target.isascii() or not target.isidentifier() or target.startswith("_"):
        raise ProgramTextError(f"{str(target)[:60]!r} is no name; use letters, digits and _")
    if not isinstance(function, str) or function not in functions:
        raise ProgramTextError(f"there is no function {str(function)[:60]!r}; there are {', '.join(sorted(functions))}")
    operands = [statement.get(key) for key in _OPERANDS]
    arity = functions[function]
    if None in operands[:arity] or any(operand is not None for operand in operands[arity:]):
        raise ProgramTextError(f"{function} takes {arity} operands: {', '.join(_OPERANDS[:arity])}")
    return target, function, operands[:arity]


def _operand(operand: Any, values: Mapping[str, Symbol]) -> Symbol | Arg:
    if isinstance(operand, str):
        if operand not in values:
            raise ProgramTextError(f"{operand[:60]!r} is used before it is assigned; there are {', '.join(values)}")
        return values[operand]
    try:
        if (
            isinstance(operand, (int, float))
            and not isinstance(operand, bool)
            and math.isfinite(number := float(operand))
        ):
            return number
    except OverflowError:
        pass
    raise ProgramTextError(f"{str(operand)[:60]!r} is neither a name nor a finite number")


__all__ = ["MOST_STATEMENTS", "loss_statements_schema", "read_loss", "read_rule_statements", "rule_statements_schema"]
