"""Write a Program as readable Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from metaopt.program.ops import MATRIX_OPS, OPS, REDUCTIONS
from metaopt.program.program import Arg, Program, Statement


def python_source(program: Program, name: str = "update", coefficients_name: str = "coefficients") -> str:
    """Two functions as text: the scalar arithmetic, and the update of one tensor (out of place, torch only).

    The source computes what `metaopt.program.evaluate` computes, in the same order. Functions of matrices are those of
    `metaopt.matrix`, under their names.
    """
    return f"{coefficients_source(program, coefficients_name)}\n\n\n{update_source(program, name)}"


def function_source(program: Program, name: str, doc: str = "", guarded: Collection[str] = ()) -> str:
    """The whole program as one function: ``def name(param, grad, *slots, *, lr, beta1, ..., t)``, scalars as floats.

    No output aliases an input, so a caller may keep them. Statements in ``guarded`` are printed with ``_div``,
    ``_sqrt``, ``_exp`` and the like: the caller provides these, giving NaN or infinity where Python would raise.
    """
    writer = Writer(program, scalar=None, guarded=guarded)
    used = {arg for s in program.statements for arg in s.args} | set(program.outputs)
    scalars = [scalar for scalar in program.scalars if scalar in used]
    keyword = f", *, {', '.join(scalars)}" if scalars else ""
    lines = [f"def {name}({', '.join(program.tensors)}{keyword}):"]
    lines += [f'    """{doc}"""'] if doc else []
    lines += [f"    {line}" for line in writer.lines(program.prelude + program.kernel, keep=set())]
    outputs = [writer.output(out) for out in program.outputs]
    if sum(map(len, outputs)) > 96:
        return "\n".join([*lines, "    return (", *(f"        {out}," for out in outputs), "    )"])
    return "\n".join([*lines, f"    return {', '.join(outputs)}"])


def coefficients_source(program: Program, name: str) -> str:
    """``def coefficients(lr, beta1, ..., t)`` -> the kernel's scalars as a dict of floats."""
    writer = Writer(program, scalar=True)
    lines = [f"def {name}({', '.join(program.scalars)}):"]
    lines += [f"    {line}" for line in writer.lines(program.prelude, keep=set(program.coefficients))]
    items = ", ".join(f'"{c}": {c}' for c in program.coefficients)
    return "\n".join([*lines, f"    return {{{items}}}"])


def update_source(program: Program, name: str) -> str:
    """``def update(param, grad, *slots, *, **coefficients)`` -> new parameter and slots."""
    writer = Writer(program, scalar=False)
    keyword = f", *, {', '.join(program.coefficients)}" if program.coefficients else ""
    lines = [f"def {name}({', '.join(program.tensors)}{keyword}):"]
    lines += [f"    {line}" for line in writer.lines(program.kernel, keep=set())]
    outputs = ", ".join(writer.number(out, 0) for out in program.outputs)
    return "\n".join([*lines, f"    return {outputs}"])


_SCALAR_FORMS = {
    "sqrt": "math.sqrt({0})", "abs": "abs({0})", "maximum": "max({0}, {1})", "minimum": "min({0}, {1})",
    "exp": "math.exp({0})", "log": "math.log({0})", "tanh": "math.tanh({0})",
    "sin": "math.sin({0})", "cos": "math.cos({0})", "atan": "math.atan({0})",
    "sign": "float(({0} > 0) - ({0} < 0))",
}  # fmt: skip
_WIDEST = 96


class Writer:
    """Prints statements, folding those that are used once and unnamed into the expression that uses them.

    ``scalar``: whether statements are on floats; None means: those of the program's prelude are.
    """

    def __init__(self, program: Program, *, scalar: bool | None, guarded: Collection[str] = ()) -> None:
        self.program = program
        self.like = program.tensors[0]  # whose shape and dtype the outputs have
        self.scalar = scalar
        self.guarded = guarded
        self.uses = Counter(arg for s in program.statements for arg in s.args) + Counter(program.outputs)
        self.by_name = {s.target: s for s in program.statements}
        self.folded: set[Arg] = set()

    def lines(self, statements: tuple[Statement, ...], keep: set[str]) -> list[str]:
        for s in statements:
            automatic = s.target.startswith("v") and s.target[1:].isdigit() and self.uses[s.target] == 1
            complement = self.scalar is None and s.target.startswith("one_minus_")
            if s.target not in keep and (automatic or complement):
                self.folded.add(s.target)
            while len(self.expression(s)[0]) > _WIDEST and (inner := self.folded & set(s.args)):
                self.folded.remove(max(inner, key=lambda arg: (len(self.text(arg, 0)), arg)))
        return [f"{s.target} = {self.expression(s)[0]}" for s in statements if s.target not in self.folded]

    def output(self, out: Arg) -> str:
        """An output that shares no memory with the inputs."""
        if self.is_scalar(out):
            return f"torch.full_like({self.like}, {self.text(out, 0)})"
        if out not in self.program.element_names:
            return f"torch.zeros_like({self.like}) + {self.number(out, 6)}"
        made = self.by_name.get(str(out))
        if made is not None and made.op == "where" and self.is_scalar(made.args[0]):
            return f"({self.text(out, 0)}).clone()"  # a branch may be an input
        return f"{out}.clone()" if out in self.program.tensors else self.number(out, 0)

    def is_scalar(self, arg: Arg) -> bool:
        return isinstance(arg, float) or arg in self.program.scalar_names

    def is_mask(self, arg: Arg) -> bool:
        """Whether the text of a value gives a tensor of bools."""
        return isinstance(arg, str) and not self.is_scalar(arg) and arg in self.by_name and _compares(self.by_name[arg])

    def expression(self, s: Statement) -> tuple[str, int]:
        """Text and precedence of a statement's right side."""
        scalar = self.is_scalar(s.target) if self.scalar is None else self.scalar
        if s.op in REDUCTIONS:
            method = REDUCTIONS[s.op].python
            return method.format(self.number(s.args[0], 9 if method.startswith("{0}") else 0)), 9
        if s.op in MATRIX_OPS:
            return f"{s.op}({self.number(s.args[0], 0)})", 9
        op = OPS[s.op]
        if s.op == "where":
            return self.choice(s, scalar)
        if not scalar and s.op in ("maximum", "minimum") and any(map(self.is_scalar, s.args)):
            tensor, bound = sorted(s.args, key=self.is_scalar)
            side = "min" if s.op == "maximum" else "max"
            return f"torch.clamp({self.number(tensor, 0)}, {side}={self.text(bound, 0)})", 9
        if s.target in self.guarded:
            return f"_{s.op}({', '.join(self.text(arg, 0) for arg in s.args)})", 9
        if scalar and _compares(s):
            return f"float({self.comparison(s)})", 9
        template = _SCALAR_FORMS.get(s.op, op.python) if scalar else op.python
        literal = scalar and (s.op in ("maximum", "minimum") or all(isinstance(arg, float) for arg in s.args))
        args = []
        for i, arg in enumerate(s.args):
            if op.precedence == 9:
                least = 0 if template.count("{0}") == 1 else 9
            elif _compares(s):
                least = op.precedence + 1  # comparisons do not associate
            else:
                # the right operand of -, / and ** (and the left of **) binds tighter
                least = op.precedence + (i == 1 if s.op != "pow" else i == 0)
            power = s.op == "pow" and i == 1
            least = 0 if power and isinstance(arg, float) else least
            args.append(_floating(arg, least) if literal and isinstance(arg, float) else self.number(arg, least))
        return template.format(*args), op.precedence

    def choice(self, s: Statement, scalar: bool) -> tuple[str, int]:
        condition, *branches = s.args
        if scalar:
            yes, no = (_floating(b, 0) if isinstance(b, float) else self.text(b, 2 - i) for i, b in enumerate(branches))
            return f"{yes} if {self.test(condition)} else {no}", 1
        if self.is_scalar(condition):
            yes, no = (self.branch(b, s.target in self.program.element_names) for b in branches)
            return f"{yes} if {self.test(condition)} else {no}", 1
        test = self.text(condition, 0) if self.is_mask(condition) else f"{self.text(condition, 5)} != 0"
        yes, no = (self.number(branch, 0) for branch in branches)
        if self.is_scalar(branches[0]) and self.is_scalar(branches[1]):
            yes = f"torch.full_like({self.like}, {yes})"  # of two floats torch would make a float32
        return f"torch.where({test}, {yes}, {no})", 9

    def branch(self, arg: Arg, of_elements: bool) -> str:
        """One of two values between which Python chooses; ``of_elements``: it must have the shape of the tensors."""
        if self.is_scalar(arg):
            return f"torch.full_like({self.like}, {self.text(arg, 0)})"
        if of_elements and arg not in self.program.element_names:
            return f"torch.zeros_like({self.like}) + {self.number(arg, 6)}"
        return self.number(arg, 2)

    def test(self, condition: Arg) -> str:
        """A scalar condition."""
        folded = condition in self.folded and _compares(self.by_name[str(condition)])
        return self.comparison(self.by_name[str(condition)]) if folded else self.text(condition, 2)

    def comparison(self, s: Statement) -> str:
        return OPS[s.op].python.format(*(self.text(arg, OPS[s.op].precedence + 1) for arg in s.args))

    def number(self, arg: Arg, minimum: int) -> str:
        """The text of an operand; a comparison of tensors counts as 1 or 0."""
        return f"{self.text(arg, 9)}.to({self.like}.dtype)" if self.is_mask(arg) else self.text(arg, minimum)

    def text(self, arg: Arg, minimum: int) -> str:
        if isinstance(arg, float):
            if not arg.is_integer() or abs(arg) >= 1e15 or repr(arg) == "-0.0":
                return _floating(arg, minimum)
            return f"({int(arg)})" if arg < 0 and minimum > 0 else repr(int(arg))
        if arg in self.folded:
            text, precedence = self.expression(self.by_name[arg])
            return f"({text})" if precedence < minimum else text
        return arg


def _floating(number: float, minimum: int) -> str:
    """A literal that no arithmetic takes for an integer: of these Python makes integers of any length."""
    if not math.isfinite(number):
        return f'float("{number}")'
    return f"({number!r})" if math.copysign(1.0, number) < 0 and minimum > 0 else repr(number)


def _compares(s: Statement) -> bool:
    return s.op in ("gt", "lt", "ge", "le")
