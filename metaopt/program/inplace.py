"""Run a Program in place: one planner, printed for lists of tensors (``torch._foreach_*``) or for single tensors.

The planner works in three stages. *Selection* turns statements into torch calls and folds products into
``add(alpha=)``, ``addcmul``, ``addcdiv`` and ``lerp``. *Placement* gives every value a buffer, reusing those of dead
values and of state whose last read has passed. *Moves* bring the outputs to the buffers that they belong to, as one
parallel assignment, so that a program may swap its slots.
"""

from __future__ import annotations

import hashlib
import keyword
import linecache
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from metaopt.program.ops import COMPARISONS
from metaopt.program.program import Arg, Program, Statement
from metaopt.rule import compute_dtype

_COMMUTATIVE = ("add", "mul", "maximum", "minimum")
_CLAMP = {"maximum": "clamp_min", "minimum": "clamp_max"}


@dataclass(frozen=True)
class _Call:
    """``target = op(*tensors, *tail)``.

    Attributes:
        target: the value that it defines.
        op: name of the tensor method and suffix of ``torch._foreach_``; or, where ``torch`` has no such pair, an
            expression on single tensors with ``{0}`` for the first of ``tensors``, ``{like}`` for any float tensor.
        tensors: the values that it reads.
        tail: scalar arguments, as text.
        inplace: positions in ``tensors`` whose buffer may receive the result.
    """

    target: str
    op: str
    tensors: tuple[str, ...]
    tail: tuple[str, ...] = ()
    inplace: tuple[int, ...] = ()

    @property
    def is_expression(self) -> bool:
        return not self.op.isidentifier()


@dataclass(frozen=True)
class _Product:
    """``scalars * tensors``, or ``scalars * tensors / divisor``, and the statements that it replaces."""

    scalars: tuple[Arg, ...]
    tensors: tuple[str, ...]
    divisor: str | None = None
    absorbed: frozenset[str] = frozenset()


def in_place_source(program: Program, *, lists: bool) -> str:
    """Text of ``step(param, grad, *slots, *coefficients)``, which updates ``param`` and the slots in place.

    Args:
        program: what to run; its names must be identifiers.
        lists: work on lists of tensors (one ``torch._foreach_*`` call per operation) instead of on single tensors.

    Returns:
        Python source that needs the name ``torch`` and never writes ``grad``.

    Raises:
        ValueError: a name that Python cannot take as an argument, or a program that is not elementwise throughout.
    """
    if program.reach != "element":
        raise ValueError("a program with reductions or matrix operations has no step in place; run it by evaluate_tree")
    names = [*program.tensors, *program.scalars, *(s.target for s in program.statements)]
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name) or name in ("torch", "zip"):
            raise ValueError(f"{name!r} cannot name a value of a program that is written as Python; rename it")
    calls, values = _Selection(program).run()
    printer = _Printer(program, lists)
    storage = _place(program, calls, values, printer)
    _move(program, values, storage, printer)
    arguments = ", ".join((*program.tensors, *program.coefficients))
    return "\n".join([f"def step({arguments}):", *(f"    {line}" for line in printer.lines or ["pass"])]) + "\n"


@lru_cache(maxsize=1024)
def compile_in_place(program: Program, *, lists: bool) -> Callable[..., None]:
    """The function of `in_place_source`, as ``step(columns, coefficients)``.

    ``columns`` holds, per name in ``program.tensors``, a list of tensors (``lists=True``; one dtype per column) or one
    tensor; ``coefficients`` are the floats of ``program.scalar_values``. Parameters and slots are updated in place,
    gradients are not written, no autograd history is kept. bf16 and fp16 parameters are updated in float32 and rounded
    once at the store.
    """
    source = in_place_source(program, lists=lists)
    filename = f"<metaopt step {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(source, filename, "exec"), namespace)
    body = namespace["step"]
    names = program.coefficients

    def step(columns: Sequence[Any], coefficients: Mapping[str, float]) -> None:
        if lists and not columns[0]:
            return
        with torch.no_grad():
            dtypes = [(column[0] if lists else column).dtype for column in columns]
            dtype = compute_dtype(dtypes[0])
            wide = [
                column if own == dtype else [tensor.to(dtype) for tensor in column] if lists else column.to(dtype)
                for column, own in zip(columns, dtypes, strict=True)
            ]
            body(*wide, *(coefficients[name] for name in names))
            for index, (column, computed) in enumerate(zip(columns, wide, strict=True)):
                if computed is column or index == 1:  # 1: the gradient
                    continue
                if lists:
                    torch._foreach_copy_(column, computed)
                else:
                    column.copy_(computed)

    return step


class _Selection:
    """From statements to calls."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.by_name = {s.target: s for s in program.kernel}
        self.uses = Counter(arg for s in program.kernel for arg in s.args) + Counter(program.outputs)
        self.taken = {*program.tensors, *program.scalars, *(s.target for s in program.statements)}
        self.calls: list[_Call] = []
        self.numbers: dict[str, str] = {}  # comparison -> its value as 1.0 or 0.0
        chains = [(s.target, self._overwritable(s)) for s in program.kernel]
        self.homes = _homes(program, chains, {arg: arg for arg in program.outputs})
        self.roots: dict[str, frozenset[str]] = {t: frozenset([t]) for t in program.tensors}
        for target, operands in chains:
            self.roots[target] = frozenset().union(*(self.roots[operand] for operand in operands))

    def run(self) -> tuple[list[_Call], tuple[Arg, ...]]:
        """The calls, and the values that the outputs take."""
        folded = {s.target: fold for s in self.program.kernel if (fold := self._folded(s)) is not None}
        absorbed = frozenset().union(*(product.absorbed for _, product in folded.values()))
        for s in self.program.kernel:
            if s.target in absorbed:
                continue
            if s.target in folded:
                self._emit_fold(s, *folded[s.target])
            elif s.op in COMPARISONS:
                self._expression(s, f"{{}} {COMPARISONS[s.op]} {{}}", s.args)
            elif s.op == "where":
                self._emit_where(s)
            else:
                self._emit(s)
        outputs = tuple(out if self._is_scalar(out) else self._number(str(out)) for out in self.program.outputs)
        return self.calls, outputs

    def _is_scalar(self, arg: Arg) -> bool:
        return isinstance(arg, float) or arg in self.program.scalar_names

    def _overwritable(self, s: Statement) -> list[str]:
        """Operands whose buffer the result could take."""
        if s.op in COMPARISONS or s.op == "where":
            return []
        operands = s.args if s.op in _COMMUTATIVE else s.args[:1]
        if s.op in ("sub", "div") and self._is_scalar(s.args[0]):
            operands = s.args[1:]
        return [str(arg) for arg in operands if not self._is_scalar(arg)]

    def _fresh(self, base: str) -> str:
        name = base
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _number(self, value: str) -> str:
        """The value itself, or of a comparison its truth as a float."""
        if value not in self.by_name or self.by_name[value].op not in COMPARISONS:
            return value
        if value not in self.numbers:
            self.numbers[value] = self._fresh(f"{value}_number")
            self.calls.append(_Call(self.numbers[value], "{0}.to({like}.dtype)", (value,)))
        return self.numbers[value]

    # -- folding -----------------------------------------------------------------------------------------------------

    def _folded(self, s: Statement) -> tuple[str, _Product] | None:
        """``(x, product)`` if ``s`` is ``x + product`` or ``x - product`` and one torch call computes that."""
        if s.op not in ("add", "sub") or any(self._is_scalar(arg) for arg in s.args):
            return None
        x, y = (str(arg) for arg in s.args)
        home = self.homes.get(s.target)
        choices = [(x, y), (y, x)] if s.op == "add" else [(x, y)]
        if len(choices) == 2 and self._leads(y, home) and not self._leads(x, home):
            choices = [(y, x)]  # folding y would leave the result in the wrong buffer
        elif len(choices) == 2 and self._leads(x, home) and not self._leads(y, home):
            choices = [(x, y)]
        for kept, other in choices:
            product = self._product(other, room=2)
            if product.absorbed:
                return kept, product
        return None

    def _leads(self, value: str, home: str | None) -> bool:
        return home in self.roots[value]

    def _foldable(self, value: str, *ops: str) -> Statement | None:
        s = self.by_name.get(value)
        return s if s is not None and self.uses[value] == 1 and s.op in ops else None

    def _product(self, value: str, room: int, allow_divisor: bool = True) -> _Product:
        """``value`` as a product of scalars and at most ``room`` tensors."""
        s = self._foldable(value, "mul", "div")
        whole = _Product((), (value,))
        if s is None:
            return whole
        x, y = s.args
        if s.op == "mul" and (self._is_scalar(x) or self._is_scalar(y)):
            scalar, tensor = (x, y) if self._is_scalar(x) else (y, x)
            inner = self._product(str(tensor), room, allow_divisor)
            return _Product((scalar, *inner.scalars), inner.tensors, inner.divisor, inner.absorbed | {value})
        if self._is_scalar(x) or self._is_scalar(y):
            return whole  # x / scalar keeps its own call: 1 / scalar may be undefined in Python
        left = self._product(str(x), 1, False)
        if s.op == "div":
            if not allow_divisor:
                return whole
            return _Product(left.scalars, left.tensors, str(y), left.absorbed | {value})
        if room < 2:
            return whole
        right = self._product(str(y), 1, False)
        absorbed = left.absorbed | right.absorbed | {value}
        return _Product(left.scalars + right.scalars, left.tensors + right.tensors, None, absorbed)

    def _emit_fold(self, s: Statement, x: str, product: _Product) -> None:
        if self._emit_lerp(s, x, product):
            return
        tensors = [self._number(v) for v in (x, *product.tensors, *([product.divisor] if product.divisor else []))]
        factors = [_scalar(a) for a in product.scalars] or ["1.0"]
        if s.op == "sub":
            factors[0] = factors[0].removeprefix("-") if factors[0].startswith("-") else f"-{factors[0]}"
        op = "addcdiv" if product.divisor else "add" if len(product.tensors) == 1 else "addcmul"
        keyword_name = "alpha" if op == "add" else "value"
        tail = () if factors == ["1.0"] else (f"{keyword_name}={' * '.join(factors)}",)
        self.calls.append(_Call(s.target, op, tuple(tensors), tail, (0,)))

    def _emit_lerp(self, s: Statement, x: str, product: _Product) -> bool:
        """``x + weight * (end - x)``: what `torch.lerp` was traced to."""
        if s.op != "add" or len(product.scalars) != 1 or len(product.tensors) != 1 or product.divisor:
            return False
        difference = self._foldable(product.tensors[0], "sub")
        if difference is None or difference.args[1] != x or self._is_scalar(difference.args[0]):
            return False
        call = self.calls.pop()  # the difference was just selected: nothing stands between it and its only use
        if call.target != difference.target:
            self.calls.append(call)
            return False
        operands = (self._number(x), self._number(str(difference.args[0])))
        self.calls.append(_Call(s.target, "lerp", operands, (_scalar(product.scalars[0]),), (0,)))
        return True

    # -- one statement, one call -------------------------------------------------------------------------------------

    def _emit(self, s: Statement) -> None:
        scalars = tuple(_scalar(arg) for arg in s.args if self._is_scalar(arg))
        tensors = tuple(self._number(str(arg)) for arg in s.args if not self._is_scalar(arg))
        inplace = tuple(range(len(tensors))) if s.op in _COMMUTATIVE else (0,)
        op = s.op
        if scalars and op in _CLAMP:
            op = _CLAMP[op]
        elif scalars and self._is_scalar(s.args[0]) and op == "pow":
            self.calls.append(_Call(s.target, f"torch.pow({scalars[0]}, {{0}})", tensors))
            return
        elif scalars and self._is_scalar(s.args[0]) and op in ("sub", "div"):
            first, op = ("neg", "add") if op == "sub" else ("reciprocal", "mul")
            if s.op == "div" and s.args[0] == 1.0:
                first, op, scalars = "", "reciprocal", ()
            if first:
                between = self._fresh(f"{s.target}_{first}")
                self.calls.append(_Call(between, first, tensors, (), (0,)))
                tensors = (between,)
        self.calls.append(_Call(s.target, op, tensors, scalars, inplace))

    def _emit_where(self, s: Statement) -> None:
        condition, x, y = s.args
        compared = condition in self.by_name and self.by_name[str(condition)].op in COMPARISONS
        test = "" if compared else " != 0"
        if self._is_scalar(condition):  # one branch for the whole tensor
            like = y if self._is_scalar(x) else x
            branches = [f"torch.full_like({{}}, {_scalar(v)})" if self._is_scalar(v) else "{}.clone()" for v in (x, y)]
            values = [like if self._is_scalar(v) else v for v in (x, y)]
            self._expression(s, f"{branches[0]} if {_scalar(condition)} else {branches[1]}", values)
        elif self._is_scalar(x) and self._is_scalar(y):
            # a 0-d tensor carries the dtype: two plain numbers would give torch's default dtype
            branches = [f"{{like}}.new_full((), {_scalar(x)})", _scalar(y)]
            self.calls.append(_Call(s.target, f"torch.where({{0}}{test}, {', '.join(branches)})", (str(condition),)))
        else:
            self._expression(s, f"torch.where({{}}{test}, {{}}, {{}})", s.args, keep_first=True)

    def _expression(self, s: Statement, template: str, args: Sequence[Arg], keep_first: bool = False) -> None:
        """A call by expression; ``keep_first`` leaves the first argument a truth value."""
        tensors: list[str] = []
        texts = []
        for i, arg in enumerate(args):
            if self._is_scalar(arg):
                texts.append(_scalar(arg))
                continue
            texts.append(f"{{{len(tensors)}}}")
            tensors.append(str(arg) if keep_first and i == 0 else self._number(str(arg)))
        self.calls.append(_Call(s.target, template.format(*texts), tuple(tensors)))


def _scalar(arg: Arg) -> str:
    if isinstance(arg, str):
        return arg
    text = repr(arg)
    return f'float("{text}")' if "n" in text else text  # inf and nan have no literal


def _homes(program: Program, chains: Iterable[tuple[str, Sequence[str]]], outputs: Mapping[Arg, Arg]) -> dict[str, str]:
    """Where each value would best live: the buffer of the output that a chain of in-place calls makes of it."""
    homes: dict[str, str] = {}
    for out, buffer in zip(program.outputs, (program.tensors[0], *program.tensors[2:]), strict=True):
        if isinstance(outputs[out], str):
            homes.setdefault(str(outputs[out]), buffer)
    for target, operands in reversed(list(chains)):
        for operand in operands:
            if target in homes:
                homes.setdefault(operand, homes[target])
    return homes


def _place(program: Program, calls: Sequence[_Call], values: Sequence[Arg], printer: _Printer) -> dict[str, str]:
    """Print the calls; returns the buffer that holds each value at the end."""
    last = {tensor: index for index, call in enumerate(calls) for tensor in call.tensors}
    last |= {str(value): len(calls) for value in values}
    chains = [(call.target, [call.tensors[k] for k in call.inplace]) for call in calls]
    homes = _homes(program, chains, dict(zip(program.outputs, values, strict=True)))
    storage = {tensor: tensor for tensor in program.tensors}
    for index, call in enumerate(calls):
        buffers = [storage[tensor] for tensor in call.tensors]
        free = [k for k in call.inplace if last[call.tensors[k]] == index and buffers[k] != program.tensors[1]]
        if not free:
            storage[call.target] = call.target
            printer.call(call, buffers, None)
            continue
        best = min(free, key=lambda k: (buffers[k] != homes.get(call.target), buffers[k] in program.tensors))
        storage[call.target] = buffers[best]
        printer.call(call, [buffers[best], *buffers[:best], *buffers[best + 1 :]], buffers[best])
    return storage


def _move(program: Program, values: Sequence[Arg], storage: Mapping[str, str], printer: _Printer) -> None:
    """Bring every output to its buffer, all at once as far as anyone can tell."""
    destinations = (program.tensors[0], *program.tensors[2:])
    pending: dict[str, Arg] = {}
    for destination, value in zip(destinations, values, strict=True):
        source = storage.get(value, value) if isinstance(value, str) else value
        if source != destination:
            pending[destination] = source
    while pending:
        free = [destination for destination in pending if destination not in pending.values()]
        if free:
            source = pending.pop(free[0])
            printer.move(free[0], source, isinstance(source, float) or source in program.scalar_names)
            continue
        blocked = next(iter(pending))  # a cycle: set one buffer's content aside
        saved = printer.save(blocked)
        pending = {d: saved if source == blocked else source for d, source in pending.items()}


class _Printer:
    """Writes calls for single tensors or for lists of them."""

    def __init__(self, program: Program, lists: bool) -> None:
        self.lists = lists
        self.lines: list[str] = []
        self.taken = {*program.tensors, *program.scalars, *(s.target for s in program.statements)}
        self.like = f"{program.tensors[0]}[0]" if lists else program.tensors[0]

    def call(self, call: _Call, buffers: Sequence[str], into: str | None) -> None:
        """Print ``call`` on ``buffers``; ``into`` is the first of them if it receives the result."""
        arguments = ", ".join((*buffers, *call.tail))
        result = "" if into else f"{call.target} = "
        suffix = "_" if into else ""
        if call.is_expression:
            self.lines.append(f"{call.target} = {self._expression(call.op, buffers)}")
        elif self.lists:
            self.lines.append(f"{result}torch._foreach_{call.op}{suffix}({arguments})")
        elif call.op in _CLAMP:  # no in-place method
            self.lines.append(f"{result}torch.{call.op}({arguments}{f', out={into}' if into else ''})")
        else:
            self.lines.append(f"{result}{buffers[0]}.{call.op}{suffix}({', '.join((*buffers[1:], *call.tail))})")

    def _expression(self, template: str, buffers: Sequence[str]) -> str:
        if not self.lists:
            return template.format(*buffers, like=self.like)
        items = [self._fresh(f"x{k}") for k in range(len(buffers))]
        text = template.format(*items, like=self.like)
        if len(buffers) == 1:
            return f"[{text} for {items[0]} in {buffers[0]}]"
        return f"[{text} for {', '.join(items)} in zip({', '.join(buffers)})]"

    def move(self, destination: str, source: Arg, is_scalar: bool) -> None:
        """``destination`` becomes ``source``."""
        if is_scalar and self.lists:
            item = self._fresh("x0")
            self.lines += [f"for {item} in {destination}:", f"    {item}.fill_({_scalar(source)})"]
        elif is_scalar:
            self.lines.append(f"{destination}.fill_({_scalar(source)})")
        elif self.lists:
            self.lines.append(f"torch._foreach_copy_({destination}, {source})")
        else:
            self.lines.append(f"{destination}.copy_({source})")

    def save(self, buffer: str) -> str:
        """Keep the content of ``buffer`` under a new name."""
        saved = self._fresh(f"old_{buffer}")
        self.taken.add(saved)
        self.lines.append(f"{saved} = {self._expression('{0}.clone()', [buffer])}")
        return saved

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        return name
