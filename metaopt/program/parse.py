"""Read a `Program` from Python text: what `metaopt.program.source` prints, or what a person or a language model wrote.

The text is never executed. Its syntax tree is walked, and whatever is not named here is refused (an allow-list): one function
of assignments and a return, whose expressions mean what they mean in the text of an `ElementwiseRule`. Rules (`parse_program`)
and losses (`parse_loss`) are read by the same walk.
"""

from __future__ import annotations

import ast
import io
import math
import re
import threading
import tokenize
import unicodedata
from collections.abc import Sequence
from typing import NoReturn

from metaopt.program.loss_trace import LossTracer, loss_program
from metaopt.program.ops import MATRIX_OPS, OPS
from metaopt.program.program import Program
from metaopt.program.trace import Symbol, TraceError, Tracer, renamed, without_dead

LONGEST = 100_000
"""Characters of a text."""
DEEPEST = 64
"""Brackets within brackets, and signs before one operand."""
LONGEST_LOSS = 4096
DEEPEST_LOSS = 24


_PARSING = threading.Lock()
"""Held while a tree is made: CPython 3.11 counts its depth for all threads together (https://github.com/python/cpython/issues/106905)."""


class ProgramTextError(ValueError):
    """A text that is no program; the message names the line and the way out."""


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow"
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], str] = {ast.Gt: "gt", ast.Lt: "lt", ast.GtE: "ge", ast.LtE: "le"}
_FUNCTIONS = {
    "where": "where", "global_sum": "global_sum", "global_norm": "global_norm", **{name: name for name in MATRIX_OPS},
    **{f"_{op}": op for op in OPS},
}  # fmt: skip
"""Functions without a module: `metaopt.program.trace`'s, and what exported files define."""
_OF_NUMBERS = {"abs": "abs", "max": "maximum", "min": "minimum"}
_MATH = {
    "sqrt": "sqrt", "exp": "exp", "log": "log", "tanh": "tanh", "sin": "sin", "cos": "cos", "atan": "atan",
    "fabs": "abs", "pow": "pow",
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e, "inf": math.inf, "nan": math.nan}
_RESERVED = {"torch", "math", "float", *_FUNCTIONS, *_OF_NUMBERS}

Value = Symbol | float


def syntax_tree(text: str, longest: int = LONGEST, deepest: int = DEEPEST) -> ast.Module:
    """The syntax tree of a text from anywhere.

    Args:
        text: Python, or what is meant to be.
        longest: characters that it may have.
        deepest: brackets within brackets, and signs before one operand, that it may have.

    Raises:
        ProgramTextError: no Python, longer or deeper than that, or a name that Python reads as another one.
    """
    if len(text) > longest:
        raise ProgramTextError(f"a program's text may have {longest} characters, got {len(text)}")
    depth = 0
    for character in text:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        if depth > deepest:
            raise ProgramTextError(f"brackets may be {deepest} deep; give what is in them a name first")
    if re.search(rf"(?:(?:[-+~]|\bnot\b)[\s\\]*){{{deepest},}}", text):
        raise ProgramTextError(f"an operand may have {deepest} signs")
    try:
        with _PARSING:
            tree = ast.parse(text)
        _require_plain_names(text)
    except SyntaxError as error:
        raise ProgramTextError(f"line {error.lineno}: no Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        if isinstance(error, ProgramTextError):
            raise
        raise ProgramTextError(f"no Python that can be read: {error or type(error).__name__}") from None
    return tree


def _require_plain_names(text: str) -> None:
    """Python normalises names (NFKC), so that one can look unlike what it is."""
    for token in () if text.isascii() else tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and unicodedata.normalize("NFKC", token.string) != token.string:
            read = unicodedata.normalize("NFKC", token.string)
            raise ProgramTextError(
                f"line {token.start[0]}: Python reads the name {token.string!r} as {read!r}; write that"
            )


def parse_program(source: str) -> Program:
    """Read the program of a text.

    The text is one function as `function_source` prints it, ``def name(param, grad, *slots, *, lr, ..., t)``, or two as
    `python_source` does. It returns the new parameter and slots; where no ``*`` parts the arguments, the tensors are as many as
    that says, and first. Parameter and gradient may have other names. Assignments, also augmented ones, are of names; in
    expressions there are numbers, ``+ - * / **``, comparisons, ``a if number > 0 else b``, torch functions and tensor methods
    of the expression language, ``math`` functions of numbers, ``global_sum``, ``global_norm`` and the functions of matrices.
    Annotations and docstrings are skipped.

    Args:
        source: Python.

    Returns:
        The program; its scalars are those that the text names.

    Raises:
        ProgramTextError: anything else.
    """
    body = [node for node in syntax_tree(source).body if not _is_import(node)]
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    if len(functions) != len(body) or len(functions) not in (1, 2):
        raise ProgramTextError("the text must be one function, or that of coefficients and that of the update")
    try:
        return _read(functions)
    except RecursionError:
        raise ProgramTextError("an expression is nested too deeply; give its parts names first") from None


def parse_loss(source: str, tensors: Sequence[str], scalars: Sequence[str]) -> Program:
    """Read the program of a loss.

    The text is one function, as a person or a language model writes it for a trainer::

        def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
            ratio = policy_chosen_logps - policy_rejected_logps - (reference_chosen_logps - reference_rejected_logps)
            return -F.logsigmoid(self.beta * ratio)

    Its arguments are some of ``tensors`` and ``scalars`` by name, in any order, and perhaps ``self``, which has the scalars as
    attributes. Its lines are those of rules (`parse_program`), with the statistics ``x.mean()``, ``x.sum()``, ``x.std()`` and
    ``x.var()`` of the batch. It returns one value per example.

    Args:
        source: Python of at most 4096 characters.
        tensors: names of what the loss is of: one element per example each.
        scalars: names of its numbers.

    Returns:
        A program over all of ``tensors`` and ``scalars`` with the loss as its output.

    Raises:
        ProgramTextError: anything else.
    """
    function = _only_function(syntax_tree(source, LONGEST_LOSS, DEEPEST_LOSS))
    try:
        positional, keyword = _arguments(function)
        names = positional + keyword
        takes_self = names[:1] == ["self"]
        for name in names[takes_self:]:
            if name not in (*tensors, *scalars):
                _fail(function, f"there is no input {name!r}; there are {', '.join([*tensors, *scalars])}")
        tracer = LossTracer({*tensors, *scalars})
        reader = _Reader(tracer, {*scalars})
        reader.of_self = {name: Symbol(tracer, name) for name in scalars} if takes_self else {}
        reader.run(function, {name: Symbol(tracer, name) for name in names[takes_self:]})
        returned = _returned(function)
        if len(returned) != 1:
            _fail(
                function.body[-1],
                f"a loss returns one value per example, got {len(returned)} values; return the loss alone",
            )
        value = reader.value(returned[0])
    except RecursionError:
        raise ProgramTextError("an expression is nested too deeply; give its parts names first") from None
    try:
        return loss_program(tracer, tuple(tensors), tuple(scalars), value, reader.chosen)
    except ValueError as error:
        raise ProgramTextError(str(error)) from None


def _only_function(tree: ast.Module) -> ast.FunctionDef:
    body = [node for node in tree.body if not _is_import(node)]
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise ProgramTextError("the text must be one function; nothing else is read")
    return body[0]


def _read(functions: list[ast.FunctionDef]) -> Program:
    update = functions[-1]
    positional, keyword = _arguments(update)
    returned = _returned(update)
    count = len(positional) if keyword else 1 + len(returned)
    tensors, scalars = positional[:count], positional[count:] + keyword
    if len(functions) == 2:
        first, behind = _arguments(functions[0])
        scalars = first + behind
    if len(tensors) != 1 + len(returned):
        _fail(update, f"{len(tensors)} tensors have {max(0, len(tensors) - 1)} new values, all but the gradient; "
              f"the function returns {len(returned)}")  # fmt: skip
    named = ["param", "grad", *tensors[2:]]
    for name in named[2:] + scalars:
        if name in ("param", "grad", "step"):
            _fail(update, f"no slot or number may be called {name!r}; choose another name")
    reader = _Reader(Tracer({*named, *scalars}), {*scalars})
    inputs = {name: Symbol(reader.tracer, name) for name in scalars}
    known: dict[str, Value] = dict(inputs)
    if len(functions) == 2:
        made = reader.coefficients(functions[0], inputs)
        missing = [name for name in keyword if name not in made]
        if missing:
            _fail(update, f"{functions[0].name} does not return {missing[0]!r}")
        known = {name: made[name] for name in keyword}
    known |= {name: Symbol(reader.tracer, own) for name, own in zip(tensors, named, strict=True)}
    reader.run(update, known)
    outputs = tuple(reader.tracer.arg(reader.value(node)) for node in returned)
    try:
        program = Program(tuple(scalars), tuple(named), tuple(reader.tracer.statements), outputs)
    except ValueError as error:
        raise ProgramTextError(str(error)) from None
    return renamed(without_dead(program), reader.chosen)


def _arguments(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """Names before and behind the star."""
    a = function.args
    if function.decorator_list or a.defaults or any(a.kw_defaults) or a.vararg or a.kwarg or a.posonlyargs:
        _fail(function, "a program is a function without decorators, defaults, *args and **kwargs")
    positional, keyword = [arg.arg for arg in a.args], [arg.arg for arg in a.kwonlyargs]
    for name in positional + keyword:
        _require_free(function, name)
        if (positional + keyword).count(name) > 1:
            _fail(function, f"two arguments are called {name!r}")
    return positional, keyword


def _returned(function: ast.FunctionDef) -> list[ast.expr]:
    last = function.body[-1]
    if not isinstance(last, ast.Return) or last.value is None:
        _fail(last, "a program ends with a return of the new values")
    return last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]


def _fail(node: ast.AST, message: str) -> NoReturn:
    raise ProgramTextError(f"line {getattr(node, 'lineno', '?')}: {message}")


def _require_free(node: ast.AST, name: str) -> None:
    if name in _RESERVED:
        _fail(node, f"{name!r} has a meaning here; choose another name")


def _text(node: ast.AST) -> str:
    text = ast.unparse(node)
    return f"{text[:57]}..." if len(text) > 60 else text


class _Reader:
    """Gives the text's names and expressions their values.

    Args:
        tracer: collects the statements.
        numbers: the inputs that are one number.
    """

    def __init__(self, tracer: Tracer, numbers: set[str]) -> None:
        self.tracer = tracer
        self.known: dict[str, Value] = {}
        self.chosen: dict[str, str] = {}  # statements -> the text's names
        self.of_self: dict[str, Value] = {}
        self._numbers = numbers
        self._seen = 0  # statements that are known to be numbers or not

    # -- statements ------------------------------------------------------------------------------------------------

    def run(self, function: ast.FunctionDef, known: dict[str, Value]) -> None:
        """All but the return."""
        self.known = known
        lines = [line for line in function.body[:-1] if not _is_import(line)]
        if lines and isinstance(lines[0], ast.Expr) and isinstance(lines[0].value, ast.Constant):
            lines = lines[1:]  # a docstring
        for line in lines:
            if isinstance(line, ast.Assign) and len(line.targets) == 1:
                self._assign(line.targets[0], line.value)
            elif isinstance(line, ast.AnnAssign) and line.value is not None:
                self._assign(line.target, line.value)
            elif isinstance(line, ast.AugAssign):
                self._bind(line.target, self._operation(line, line.op, self.value(_loaded(line.target)), line.value))
            else:
                _fail(
                    line, f"{_text(line)!r} is no assignment; a program has no branches, loops or calls by themselves"
                )

    def coefficients(self, function: ast.FunctionDef, inputs: dict[str, Symbol]) -> dict[str, Value]:
        """What a function of numbers returns as a dict."""
        returned = _returned(function)[0]
        if not isinstance(returned, ast.Dict):
            _fail(function, "the first of two functions returns a dict of the second one's numbers")
        self.run(function, dict(inputs))
        values: dict[str, Value] = {}
        for key, node in zip(returned.keys, returned.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                _fail(returned, "the keys must be names")
            values[key.value] = self.value(node)
            self._name(key.value, values[key.value])
        return values

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            values = [self.value(node) for node in value.elts]
            for node, one in zip(target.elts, values, strict=True):
                self._bind(node, one)
        else:
            self._bind(target, self.value(value))

    def _bind(self, target: ast.expr, value: Value) -> None:
        if not isinstance(target, ast.Name):
            _fail(target, f"{_text(target)!r} cannot be assigned; programs assign names")
        _require_free(target, target.id)
        self.known[target.id] = value
        self._name(target.id, value)

    def _name(self, name: str, value: Value) -> None:
        if isinstance(value, Symbol):
            self.chosen.setdefault(value._name, name)

    # -- expressions -----------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Value:
        """What an expression stands for."""
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return self._number(node, number)
            case ast.Name(id=name):
                if name not in self.known:
                    _fail(node, f"{name!r} is used before it is assigned; there are {', '.join(self.known)}")
                return self.known[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.value(operand)
                return self.tracer.emit("neg", value) if isinstance(value, Symbol) else -value
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right) if _is_zeros(left):
                return self.value(right)  # how an output is printed that is one number of a tensor
            case ast.BinOp(left=left, op=op, right=right):
                return self._operation(node, op, self.value(left), right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return self.tracer.emit(_COMPARISONS[type(op)], self.value(left), self.value(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = self._of_numbers(test, self._condition(test), "a branch", "torch.where")
                return self.tracer.emit("where", condition, self.value(body), self.value(orelse))
            case ast.Attribute(value=ast.Name(id="math" | "torch"), attr=attr) if attr in _CONSTANTS:
                return _CONSTANTS[attr]
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if self.of_self:
                if attr not in self.of_self:
                    _fail(node, f"self has {', '.join(self.of_self)}, not {attr!r}; write a number instead")
                return self.of_self[attr]
            case ast.Call():
                return self._call(node)
        _fail(node, f"{_text(node)!r} is no arithmetic; use + - * / **, > < >= <=, a if b else c and torch functions")

    def _number(self, node: ast.AST, number: float) -> float:
        try:
            return float(number)
        except OverflowError:
            _fail(node, "the number is larger than floats are; write float('inf')")

    def _operation(self, node: ast.AST, op: ast.operator, left: Value, right: ast.expr) -> Value:
        if type(op) not in _OPERATORS:
            _fail(node, f"{_text(node)!r}: the operators are + - * / **")
        return self.tracer.emit(_OPERATORS[type(op)], left, self.value(right))

    def _condition(self, node: ast.expr) -> Value:
        match node:
            case ast.Compare(left=left, ops=[ast.NotEq()], comparators=[ast.Constant(value=0)]):
                return self.value(left)
        return self.value(node)

    def _call(self, node: ast.Call) -> Value:
        if any(isinstance(arg, ast.Starred) for arg in node.args) or any(k.arg is None for k in node.keywords):
            _fail(node, "arguments with stars are not read; write them out")
        match node:
            case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value="inf" | "-inf" | "nan" as text)]):
                return float(text)
            case ast.Call(func=ast.Name(id="float"), args=[argument], keywords=[]):
                return self._float(argument)
            case ast.Call(func=ast.Name(id=name)) if name in _OF_NUMBERS:
                return self._function(node, _OF_NUMBERS[name], only_numbers=f"torch.{_OF_NUMBERS[name]}")
            case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
                return self._function(node, _FUNCTIONS[name])
            case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr=name)) if name in _MATH:
                return self._function(node, _MATH[name], only_numbers=f"torch.{_MATH[name]}")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                return self._torch(node, name)
            case ast.Call(func=ast.Attribute(value=module, attr=name)) if self._is_functional(module):
                return self._function(node, name)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr=module), attr=name)):
                return self._function(node, f"{module}_{name}")
            case ast.Call(func=ast.Attribute(attr="clone" | "float", value=owner), args=[], keywords=[]):
                return self.value(owner)  # a comparison is 1 or 0
            case ast.Call(
                func=ast.Attribute(attr="to", value=owner),
                args=[ast.Attribute(value=ast.Name(), attr="dtype")],
                keywords=[],
            ):
                return self.value(owner)
            case ast.Call(func=ast.Attribute(attr=name, value=owner)):
                return self._function(node, name, self.value(owner))
        _fail(node, f"{_text(node.func)!r} is no function of the language; use torch functions such as torch.sqrt")

    def _is_functional(self, module: ast.expr) -> bool:
        """Whether an expression is torch.nn.functional by either of its names."""
        match module:
            case ast.Name(id="F"):
                return "F" not in self.known
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="nn"), attr="functional"):
                return True
        return False

    def _torch(self, node: ast.Call, name: str) -> Value:
        match name, node.args, node.keywords:
            case "full_like", [_, value], []:
                return self.value(value)
            case "zeros_like" | "ones_like", [_], []:
                return float(name == "ones_like")
            case "where", [condition, x, y], []:
                return self.tracer.emit("where", self._condition(condition), self.value(x), self.value(y))
        return self._function(node, name)

    def _function(self, node: ast.Call, name: str, *owner: Value, only_numbers: str = "") -> Value:
        """A function by the name that torch has for it, applied to the arguments of ``node``."""
        args = (*owner, *(self.value(arg) for arg in node.args))
        kwargs = {str(k.arg): self.value(k.value) for k in node.keywords}
        if only_numbers:
            for arg in args:
                self._of_numbers(node, arg, _text(node.func), only_numbers)
        if name.startswith("_"):
            _fail(node, f"{_text(node.func)!r} is no function of the language; use torch functions such as torch.sqrt")
        try:
            return self.tracer.call(name, args, kwargs)
        except TraceError as error:
            _fail(node, str(error))

    def _float(self, argument: ast.expr) -> Value:
        match argument:
            case ast.BinOp(
                left=ast.Compare(left=x, ops=[ast.Gt()], comparators=[ast.Constant(value=0)]),
                op=ast.Sub(),
                right=ast.Compare(left=y, ops=[ast.Lt()], comparators=[ast.Constant(value=0)]),
            ) if ast.dump(x) == ast.dump(y):
                return self.tracer.emit("sign", self._of_numbers(x, self.value(x), "float", "torch.sign"))
        return self._of_numbers(argument, self.value(argument), "float", "the tensor as it is")

    def _of_numbers(self, node: ast.AST, value: Value, what: str, instead: str) -> Value:
        """``value``, which must be one number for all tensors."""
        new = self.tracer.statements[self._seen :]
        self._seen += len(new)
        for s in new:
            if s.op in OPS and all(not isinstance(arg, str) or arg in self._numbers for arg in s.args):
                self._numbers.add(s.target)
        if isinstance(value, Symbol) and value._name not in self._numbers:
            _fail(node, f"{what} is of numbers, and {_text(node)!r} has tensors; use {instead}")
        return value


_IMPORTS = {("torch", None), ("math", None), ("torch.nn.functional", "F")}


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import) and all((it.name, it.asname) in _IMPORTS for it in node.names)


def _is_zeros(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="zeros_like"), args=[_], keywords=[]):
            return True
    return False


def _loaded(target: ast.expr) -> ast.expr:
    """The target of an augmented assignment, as an operand."""
    if not isinstance(target, ast.Name):
        _fail(target, f"{_text(target)!r} cannot be assigned; programs assign names")
    return target


__all__ = [
    "DEEPEST", "DEEPEST_LOSS", "LONGEST", "LONGEST_LOSS", "ProgramTextError", "parse_loss", "parse_program", "syntax_tree",
]  # fmt: skip
