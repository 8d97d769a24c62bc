"""A candidate of the search, as text, JSON or a `Program`: assignments to variables, which may be assigned again."""

from __future__ import annotations

import ast
import hashlib
import json
import keyword
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from metaopt.objective import INPUTS, Objective
from metaopt.program.parse import syntax_tree
from metaopt.program.program import Arg, Program, Statement
from metaopt.program.trace import renamed, without_dead
from metaopt.rule import ElementwiseRule, flat_hp
from metaopt_symbolic.language import FUNCTIONS, OF_OPERATION


class GenomeError(ValueError):
    """A text, JSON or list of assignments that is no program of the search language."""


LOSS = "loss"
"""What a program that returns this alone is."""


class Assign(NamedTuple):
    """``target = function(*args)``; an argument is a variable's name or a number."""

    target: str
    function: str
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class Genome:
    """A program of the search.

    Redundant assignments are part of it, as stepping stones. Every input may be assigned, and what a later assignment reads is
    the latest value.

    An optimizer, or a loss: that is what has one output, called ``loss``.

    Attributes:
        tensors: variables that hold a tensor at the start: of an optimizer ``("w", "g", *slots)``, of a loss inputs of
            `metaopt.objective.INPUTS`, with a value per example.
        scalars: variables that hold a number at the start: of an optimizer ``("lr",)`` or ``("lr", "t")``, of a loss
            hyperparameters.
        outputs: variables whose last values are the result: of an optimizer ``("update", *slots)``, of a loss ``("loss",)``.
        body: the assignments.

    Raises:
        GenomeError: an unknown function, a wrong number of arguments, a variable that is read before it is assigned, a name
            that is none.
    """

    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    outputs: tuple[str, ...]
    body: tuple[Assign, ...]

    def __post_init__(self) -> None:
        known = {*self.tensors, *self.scalars}
        if len(known) < len(self.tensors) + len(self.scalars):
            raise GenomeError(f"inputs must differ, got {', '.join([*self.tensors, *self.scalars])}")
        for name in [*self.tensors, *self.scalars, *self.outputs, *(a.target for a in self.body)]:
            # Python takes some letters for others (NFKC), and generated code is not all Python
            fits = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
            if not fits or name in FUNCTIONS or name in ("inf", "nan", "torch", "math", "float", "self"):
                raise GenomeError(
                    f"{name!r} cannot name a variable; use an ASCII identifier that is no keyword and means nothing else"
                )
        for name in self.scalars:
            if name in self.outputs[1:]:
                raise GenomeError(f"{name!r} is a number at the start, so it cannot be state; make it a tensor")
        for k, (target, function, args) in enumerate(self.body):
            if function not in FUNCTIONS:
                raise GenomeError(f"line {k + 1}: there is no function {function!r}; there are {', '.join(FUNCTIONS)}")
            if len(args) != FUNCTIONS[function].arity:
                raise GenomeError(
                    f"line {k + 1}: {function} takes {FUNCTIONS[function].arity} arguments, got {len(args)}"
                )
            for arg in args:
                if isinstance(arg, str) and arg not in known:
                    raise GenomeError(f"line {k + 1}: {arg!r} is read before it is assigned")
            known.add(target)
        for name in self.outputs:
            if name not in known:
                raise GenomeError(f"the output {name!r} is never assigned")

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss, or else an optimizer."""
        return self.outputs == (LOSS,)

    @property
    def slots(self) -> tuple[str, ...]:
        """The state of an optimizer; a loss has none."""
        return () if self.is_loss else self.tensors[2:]

    def scaled(self, factor: float) -> Genome:
        """The program whose learning rate is ``factor`` times as large: in the number that ``lr`` is multiplied by, if nothing
        else reads what the program gets as ``lr``, else in a line of its own."""
        assigned = next((k for k, a in enumerate(self.body) if a.target == "lr"), len(self.body))
        readers = [k for k, a in enumerate(self.body[: assigned + 1]) if "lr" in a.args]
        at = readers[0] if len(readers) == 1 else 0
        _, function, args = self.body[at] if readers else Assign("", "", ())
        if len(readers) == 1 and function == "mul" and isinstance(args[1], float):
            changed = [self.body[at]._replace(args=("lr", args[1] * factor))]
            return replace(self, body=(*self.body[:at], *changed, *self.body[at + 1 :]))
        return replace(self, body=(Assign("lr", "mul", ("lr", float(factor))), *self.body))

    # -- text and JSON ---------------------------------------------------------------------------------------------

    def text(self, name: str | None = None) -> str:
        """Python that `parse` reads back: a function called ``name``, else ``train`` or ``loss``."""
        lines = [f"def {name or (LOSS if self.is_loss else 'train')}({', '.join([*self.tensors, *self.scalars])}):"]
        lines += [f"    {target} = {function}({', '.join(map(_text, args))})" for target, function, args in self.body]
        return "\n".join([*lines, f"    return {', '.join(self.outputs)}", ""])

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back; numbers that JSON has not are text."""
        body = [[target, function, [_to_json(arg) for arg in args]] for target, function, args in self.body]
        return {
            "tensors": [*self.tensors], "scalars": [*self.scalars], "outputs": [*self.outputs], "body": body
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """Sixteen hex digits, the same for equal genomes on every machine."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

    # -- as a program ----------------------------------------------------------------------------------------------

    def program(self, *, named: bool = False) -> Program:
        """The rule ``param <- param - update``, or the loss, as the engine's single-assignment `Program`, without dead
        statements.

        Args:
            named: whether values keep the variables' names, for readers.

        Raises:
            GenomeError: an output that has no value per element, outputs beside the first that are not the slots in order, or a
                slot or number called as an optimizer's own things.
        """
        if self.outputs[1:] != self.slots:
            raise GenomeError(
                f"after {self.outputs[0]!r} an optimizer must return {self.slots}, got {self.outputs[1:]}"
            )
        for name in (*(self.tensors if self.is_loss else self.slots), *self.scalars):
            if name in ("param", "grad", "step"):
                raise GenomeError(f"{name!r} is a name of the optimizer; choose another for the slot or number")
        statements: list[Statement] = []
        made: dict[tuple[str, ...], str] = {}
        own = {} if self.is_loss else dict(zip(self.tensors, ("param", "grad"), strict=False))
        values: dict[str, Arg] = {name: own.get(name, name) for name in (*self.tensors, *self.scalars)}
        names: dict[str, str] = {}
        inputs = {str(value) for value in values.values()}

        def emit(op: str, *args: Arg) -> Arg:
            key = op, *map(repr, args)  # 0.0 == -0.0
            if key not in made:
                target = f"v{len(statements)}"
                while target in inputs:
                    target += "_"
                statements.append(Statement(target, op, args))
                made[key] = target
            return made[key]

        try:
            for target, function, args in self.body:
                values[target] = FUNCTIONS[function].expand(
                    emit, *(values[arg] if isinstance(arg, str) else float(arg) for arg in args)
                )
                names.setdefault(str(values[target]), target)
            outputs = tuple(values[name] for name in self.outputs)
            if not self.is_loss:
                outputs = (emit("sub", "param", outputs[0]), *outputs[1:])
            tensors = tuple(own.get(name, name) for name in self.tensors)
            program = Program(self.scalars, tensors, tuple(statements), outputs)
        except ValueError as error:
            raise GenomeError(str(error)) from error
        for name in self.outputs:
            if values[name] not in program.element_names:
                raise GenomeError(f"the output {name!r} has no value for each element; it must depend on a tensor")
        return renamed(without_dead(program), names) if named else without_dead(program)


def parse(text: str) -> Genome:
    """Read the text of `Genome.text`; nothing of it is executed.

    State is what the function returns beside its first value. Scalars are the arguments that are neither the first two nor
    returned. Of a loss, which returns ``loss`` alone, they are the arguments that `metaopt.objective.INPUTS` does not name.

    Raises:
        GenomeError: anything else than assignments of calls to variables, and one return.
    """
    try:
        body = syntax_tree(text).body
    except ValueError as error:
        raise GenomeError(str(error)) from None
    function = body[0] if len(body) == 1 else None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        raise GenomeError("the text must be one function, without decorators")
    a = function.args
    if a.defaults or a.kw_defaults or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs:
        raise GenomeError("the function must have plain arguments, without defaults or stars")
    inputs = [arg.arg for arg in a.args]
    *lines, last = function.body
    if lines and isinstance(lines[0], ast.Expr) and isinstance(lines[0].value, ast.Constant):
        lines = lines[1:]  # a docstring
    if not isinstance(last, ast.Return) or last.value is None:
        raise GenomeError("the function must end with a return")
    returned = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    outputs = tuple(_name(node) for node in returned)
    if outputs == (LOSS,):
        tensors = tuple(name for name in inputs if name in _EXAMPLES)
    else:
        tensors = (*inputs[:2], *(name for name in outputs[1:] if name in inputs[2:]))
    scalars = tuple(name for name in inputs if name not in tensors)
    return Genome(tensors, scalars, outputs, tuple(_assignment(line) for line in lines))


_EXAMPLES = {name for names in INPUTS.values() for name in names}
"""What losses have a value per example of."""


def _assignment(line: ast.stmt) -> Assign:
    if not isinstance(line, ast.Assign) or len(line.targets) != 1 or not isinstance(line.value, ast.Call):
        raise GenomeError(f"{ast.unparse(line)[:60]!r} is no assignment of a call; write x = add(y, 1.0)")
    if line.value.keywords:
        raise GenomeError(f"{ast.unparse(line)[:60]!r}: arguments have no names")
    args = tuple(_argument(node) for node in line.value.args)
    return Assign(_name(line.targets[0]), _name(line.value.func), args)


def _name(node: ast.AST) -> str:
    if not isinstance(node, ast.Name):
        raise GenomeError(f"{ast.unparse(node)[:60]!r} must be a plain name")
    return node.id


def _argument(node: ast.expr) -> Arg:
    sign = 1.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1.0, node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return sign * _float(node.value)
    name = _name(node)
    if name in ("inf", "nan"):
        return sign * float(name)
    if sign < 0:
        raise GenomeError(f"-{name} must be negative({name})")
    return name


def _float(number: float | str) -> float:
    try:
        return float(number)
    except OverflowError:
        raise GenomeError("a number is larger than floats are; write inf") from None


def _text(arg: Arg) -> str:
    return arg if isinstance(arg, str) else repr(float(arg))


def _to_json(arg: Arg) -> Any:
    if isinstance(arg, str):
        return arg
    return float(arg) if math.isfinite(arg) else {"number": repr(float(arg))}


def from_json(data: Mapping[str, Any]) -> Genome:
    """Read what `Genome.to_json` wrote.

    Raises:
        GenomeError: data of another form.
    """
    try:
        body = tuple(
            Assign(
                str(target),
                str(function),
                tuple(
                    arg if isinstance(arg, str) else _float(arg["number"] if isinstance(arg, dict) else arg)
                    for arg in args
                ),
            )
            for target, function, args in data["body"]
        )
        names = {key: tuple(map(str, data[key])) for key in ("tensors", "scalars", "outputs")}
        if any(isinstance(data[key], str) for key in names):
            raise TypeError("names must be a list")
    except GenomeError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise GenomeError(f"not a program in JSON: {error!r}") from None
    return Genome(**names, body=body)


def from_rule(rule: ElementwiseRule) -> Genome:
    """The program of a traced rule: its learning rate is ``lr`` times its value, its other hyperparameters are numbers.

    Raises:
        GenomeError: a slot that cannot be a variable.
    """
    program = rule.program
    hp = flat_hp(rule.hp)
    reserved = {"w", "g", "lr", "t", "update", "rate", *FUNCTIONS, *program.tensors}
    names: dict[str, str] = {"param": "w", "grad": "g", **{slot: slot for slot in program.tensors[2:]}, "t": "t"}
    values: dict[str, Arg] = {name: float(value) for name, value in hp.items() if name != "lr"}
    body = []
    if "lr" in hp:
        body.append(Assign("rate", "mul", ("lr", float(hp["lr"]))))
        values["lr"] = "rate"
    statements, (new_param, *new_slots) = _assignments(program, names, values, reserved)
    body += [*statements, Assign("update", "sub", ("w", new_param)), *_parallel(program.tensors[2:], new_slots)]
    used = {read for a in body for read in a.args}
    scalars = ("lr", "t") if "t" in used else ("lr",)
    return Genome(("w", "g", *program.tensors[2:]), scalars, ("update", *program.tensors[2:]), tuple(body))


def from_program(program: Program) -> Genome:
    """A rule in the engine's language, whose scalars are ``lr`` and perhaps ``t``; slots may have got other names.

    Raises:
        GenomeError: a slot or value that cannot be a variable.
    """
    own = {"w", "g", "lr", "t", "update", *FUNCTIONS}
    slots = [f"{slot}_slot" if slot in own else slot for slot in program.tensors[2:]]
    names = {**dict(zip(program.tensors, ("w", "g", *slots), strict=True)), "lr": "lr", "t": "t"}
    body, (new_param, *new_slots) = _assignments(program, names, {}, {*own, *slots})
    terms = [names.get(term, term) if isinstance(term, str) else term for term in _subtracted(program)]
    made = {a.target for a in body}
    if len(terms) == 1 and terms[0] in made:  # it gets the name
        known: dict[Arg, Arg] = {terms[0]: "update"}
        body = [
            Assign(str(known.get(a.target, a.target)), a.function, tuple(known.get(arg, arg) for arg in a.args))
            for a in body
        ]
        new_slots = [known.get(slot, slot) for slot in new_slots]
    elif terms:
        update, *others = terms
        body += [Assign("update", "copy", (update,)), *(Assign("update", "add", ("update", term)) for term in others)]
    else:
        body.append(Assign("update", "sub", ("w", new_param)))
    scalars = tuple(name for name in ("lr", "t") if name == "lr" or name in program.scalars)
    return Genome(("w", "g", *slots), scalars, ("update", *slots), (*body, *_parallel(slots, new_slots)))


def _subtracted(program: Program) -> list[Arg]:
    """The terms whose sum is taken from the parameter, the first one first; none where the new parameter is made otherwise."""
    made = {s.target: s for s in program.statements}
    terms: list[Arg] = []
    base: Arg = program.outputs[0]
    while base in made and made[str(base)].op == "sub":
        base, term = made[str(base)].args
        terms.insert(0, term)
    return terms if base == program.tensors[0] else []


def from_objective(objective: Objective) -> Genome:
    """The program of a traced objective: its hyperparameters are numbers.

    Raises:
        TraceError: the objective is no program.
    """
    return from_loss(objective.program, flat_hp(objective.hp))


def from_loss(program: Program, numbers: Mapping[str, float]) -> Genome:
    """A loss in the engine's language as a genome, its scalars having the values ``numbers``.

    Raises:
        GenomeError: a scalar without a value.
    """
    names = {name: name for name in program.tensors}
    values: dict[str, Arg] = {name: float(value) for name, value in numbers.items()}
    body, (loss,) = _assignments(program, names, values, {LOSS, *FUNCTIONS, *program.tensors})
    return Genome(program.tensors, (), (LOSS,), (*body, Assign(LOSS, "copy", (loss,))))


def _assignments(
    program: Program, names: dict[str, str], values: Mapping[str, Arg], reserved: Container[str]
) -> tuple[list[Assign], list[Arg]]:
    """The statements of a traced program, and its outputs.

    Args:
        program: in the engine's language.
        names: of its tensors and ``t``, as variables; those of its statements are added.
        values: of its other scalars.
        reserved: names that no statement may have.
    """
    for k, s in enumerate(program.statements):
        fits = s.target not in reserved and not keyword.iskeyword(s.target)
        names[s.target] = s.target if fits else f"{s.target}_{k}"

    def arg(value: Arg) -> Arg:
        return values.get(value, names.get(value, value)) if isinstance(value, str) else value

    body = [Assign(names[s.target], OF_OPERATION.get(s.op, s.op), tuple(map(arg, s.args))) for s in program.statements]
    return body, [*map(arg, program.outputs)]


def _parallel(slots: Sequence[str], values: Sequence[Arg]) -> list[Assign]:
    """All slots take their values at once, so a value that is another slot is saved first."""
    saved = {v: f"{v}_before" for v in values if isinstance(v, str) and v in slots}
    moves = [Assign(name, "copy", (slot,)) for slot, name in saved.items() if slots.index(slot) != values.index(slot)]
    kept = {move.args[0]: move.target for move in moves}
    for slot, value in zip(slots, values, strict=True):
        if value != slot:
            moves.append(Assign(slot, "copy", (kept.get(value, value) if isinstance(value, str) else value,)))
    return moves


SEEDS: dict[str, str] = {
    # the paper's Program 3: AdamW without bias correction and epsilon
    "adamw": """\
def train(w, g, m, v, lr):
    g2 = square(g)
    m = interpolate(g, m, 0.9)
    v = interpolate(g2, v, 0.999)
    root = sqrt(v)
    update = div(m, root)
    decay = mul(w, 0.01)
    update = add(update, decay)
    lr = mul(lr, 0.001)
    update = mul(update, lr)
    return update, m, v
""",
    "lion": """\
def train(w, g, m, lr):
    mixed = interpolate(g, m, 0.9)
    update = sign(mixed)
    m = interpolate(g, m, 0.99)
    decay = mul(w, 0.1)
    update = add(update, decay)
    lr = mul(lr, 0.0001)
    update = mul(update, lr)
    return update, m
""",
    "rmsprop": """\
def train(w, g, v, lr):
    g2 = square(g)
    v = interpolate(g2, v, 0.99)
    root = sqrt(v)
    update = div(g, root)
    lr = mul(lr, 0.001)
    update = mul(update, lr)
    return update, v
""",
    "momentum": """\
def train(w, g, m, lr):
    m = interpolate(g, m, 0.9)
    lr = mul(lr, 0.1)
    update = mul(m, lr)
    return update, m
""",
    # without bias correction and epsilon, as the paper's AdamW
    "adabelief": """\
def train(w, g, m, v, lr):
    m = interpolate(g, m, 0.9)
    surprise = sub(g, m)
    s2 = square(surprise)
    v = interpolate(s2, v, 0.999)
    root = sqrt(v)
    update = div(m, root)
    lr = mul(lr, 0.001)
    update = mul(update, lr)
    return update, m, v
""",
    # all tensors as matrices, at the scale of AdamW's updates (https://arxiv.org/abs/2502.16982)
    "muon": """\
def train(w, g, m, lr):
    m = interpolate(g, m, 0.95)
    ahead = interpolate(g, m, 0.95)
    update = orthogonalise(ahead)
    rows = row_count(w)
    columns = column_count(w)
    longest = max(rows, columns)
    scale = sqrt(longest)
    scale = mul(scale, 0.2)
    update = mul(update, scale)
    decay = mul(w, 0.1)
    update = add(update, decay)
    lr = mul(lr, 0.001)
    update = mul(update, lr)
    return update, m
""",
}
"""Programs to start from, by name; any registered `ElementwiseRule` is one too (`from_rule`)."""

LOSS_SEEDS: dict[str, str] = {
    "dpo": """\
def loss(rho):
    z = mul(rho, 0.05)
    likelihood = logsigmoid(z)
    loss = negative(likelihood)
    return loss
""",
    "ipo": """\
def loss(rho):
    gap = sub(rho, 10.0)
    loss = square(gap)
    return loss
""",
    "slic": """\
def loss(rho):
    z = mul(rho, 0.05)
    gap = sub(1.0, z)
    loss = relu(gap)
    return loss
""",
    "lrml": """\
def loss(rho):
    z = mul(rho, 0.05)
    x = mul(z, 20.0)
    far = logsigmoid(x)
    far = sub(far, z)
    exponential = exp(far)
    x = negative(x)
    near = sigmoid(x)
    likelihood = logsigmoid(z)
    logistic = mul(near, likelihood)
    loss = sub(exponential, logistic)
    return loss
""",
}
"""Preference losses to start from (beta = tau = 0.05), of rho; any registered objective that is a program is one too
(`from_objective`)."""
