"""Write a Program as readable Python."""

from __future__ import annotations

from collections import Counter

from metaopt.program.ops import OPS
from metaopt.program.program import Arg, Program, Statement


def python_source(program: Program, name: str = "update", coefficients_name: str = "coefficients") -> str:
    """Two functions as text: the scalar arithmetic, and the update of one tensor (out of place, torch only).

    The source computes what `metaopt.program.evaluate` computes, in the same order.
    """
    return f"{coefficients_source(program, coefficients_name)}\n\n\n{update_source(program, name)}"


def coefficients_source(program: Program, name: str) -> str:
    """``def coefficients(lr, beta1, ..., t)`` -> the kernel's scalars as a dict of floats."""
    writer = _Writer(program, scalar=True)
    lines = [f"def {name}({', '.join(program.scalars)}):"]
    lines += [f"    {line}" for line in writer.lines(program.prelude, keep=set(program.coefficients))]
    items = ", ".join(f'"{c}": {c}' for c in program.coefficients)
    return "\n".join([*lines, f"    return {{{items}}}"])


def update_source(program: Program, name: str) -> str:
    """``def update(param, grad, *slots, *, **coefficients)`` -> new parameter and slots."""
    writer = _Writer(program, scalar=False)
    keyword = f", *, {', '.join(program.coefficients)}" if program.coefficients else ""
    lines = [f"def {name}({', '.join(program.tensors)}{keyword}):"]
    lines += [f"    {line}" for line in writer.lines(program.kernel, keep=set())]
    outputs = ", ".join(writer.text(out, 0) for out in program.outputs)
    return "\n".join([*lines, f"    return {outputs}"])


_SCALAR_FORMS = {
    "sqrt": "{0} ** 0.5", "abs": "abs({0})", "maximum": "max({0}, {1})", "minimum": "min({0}, {1})",
    "exp": "math.exp({0})", "log": "math.log({0})", "tanh": "math.tanh({0})",
    "sign": "float(({0} > 0) - ({0} < 0))", "where": "({1} if {0} else {2})",
}  # fmt: skip


class _Writer:
    """Prints statements, folding those that are used once and unnamed into the expression that uses them."""

    def __init__(self, program: Program, *, scalar: bool) -> None:
        self.scalar = scalar
        self.uses = Counter(arg for s in program.statements for arg in s.args) + Counter(program.outputs)
        self.by_name = {s.target: s for s in program.statements}
        self.folded: set[Arg] = set()
        self.outputs = set(program.outputs)
        self.boundary = set(program.scalars) | set(program.coefficients)

    def lines(self, statements: tuple[Statement, ...], keep: set[str]) -> list[str]:
        for s in statements:
            automatic = s.target.startswith("v") and s.target[1:].isdigit()
            once = self.uses[s.target] == 1
            if s.target not in keep and once and automatic:
                self.folded.add(s.target)
        return [f"{s.target} = {self.expression(s)[0]}" for s in statements if s.target not in self.folded]

    def expression(self, s: Statement) -> tuple[str, int]:
        op = OPS[s.op]
        template = _SCALAR_FORMS.get(s.op, op.python) if self.scalar else op.python
        precedence = 8 if self.scalar and s.op == "sqrt" else op.precedence
        if not self.scalar and s.op in ("maximum", "minimum") and any(isinstance(a, float) for a in s.args):
            tensor, bound = sorted(s.args, key=lambda a: isinstance(a, float))
            side = "min" if s.op == "maximum" else "max"
            return f"torch.clamp({self.text(tensor, 0)}, {side}={self.text(bound, 0)})", 9
        if not self.scalar and s.op in ("maximum", "minimum") and any(a in self.boundary for a in s.args):
            tensor, bound = sorted(s.args, key=lambda a: a in self.boundary)
            side = "min" if s.op == "maximum" else "max"
            return f"torch.clamp({self.text(tensor, 0)}, {side}={self.text(bound, 0)})", 9
        call = precedence == 9 or template.startswith("(")
        # the right operand of -, / and ** (and the left of **) binds tighter
        args = []
        for i, arg in enumerate(s.args):
            tighter = i == 1 if s.op != "pow" else i == 0
            args.append(self.text(arg, 0 if call else precedence + tighter))
        return template.format(*args), precedence

    def text(self, arg: Arg, minimum: int) -> str:
        if isinstance(arg, float):
            text = repr(int(arg)) if arg.is_integer() and abs(arg) < 1e15 else repr(arg)
            if text in ("inf", "-inf", "nan"):
                return f'float("{text}")'
            return f"({text})" if arg < 0 and minimum > 0 else text
        if arg in self.folded:
            text, precedence = self.expression(self.by_name[arg])
            return f"({text})" if precedence < minimum else text
        return arg
