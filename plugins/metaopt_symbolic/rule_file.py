"""From a candidate to a Python file with an `ElementwiseRule`, as a person would have written it.

The file is what ``metaopt race file.py:Name``, ``metaopt export`` and every plugin take. The numbers that a reader knows get
names, domains and scales, so that they can be tuned: the learning rate, the decays of averages, the weight decay.
"""

from __future__ import annotations

import keyword
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from metaopt.files import write_atomic
from metaopt.program.ops import MATRIX_OPS, OPS
from metaopt.program.program import Arg, Program, Statement
from metaopt.program.source import Writer
from metaopt.program.trace import without_dead
from metaopt_symbolic.genome import Assign, Genome, GenomeError

_WIDTH = 120

_FILE = '''\
"""{name}: an optimizer found by program search."""

from __future__ import annotations

from typing import Any
{imports}


class {name}(ElementwiseRule):
    """{origin}

    As it was found, where ``lr`` is 1 but for a schedule and ``update`` is subtracted from ``w``::

{text}
    """

{fields}{methods}'''

_COEFFICIENTS = '''
    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """The hyperparameters, and which update it is."""
        return {**hp, "t": t}
'''

_DECAY = '0.0, 1.0, open_high=True, scale="decay", search=({low!r}, {high!r}), doc="EMA decay"'
_WEIGHT_DECAY = '0.0, scale="log", search=({low!r}, {high!r}), doc="weight decay"'


def write_rule_file(genome: Genome, path: Path | str, name: str, origin: str = "Found by program search.") -> Path:
    """Write the file of `rule_source`, atomically; ``f"{path}:{name}"`` then names the rule."""
    return write_atomic(path, rule_source(genome, name, origin))


def rule_source(genome: Genome, name: str, origin: str = "Found by program search.") -> str:
    """The text of a Python file with an `ElementwiseRule` that does what ``genome`` does at ``lr = 1``.

    The positive number that multiplies ``lr`` becomes the default of the hyperparameter ``lr``; the weights of averages become
    ``beta1, beta2, ...``; the number that multiplies the parameter, ``weight_decay``. Other numbers stay.

    Args:
        genome: an optimizer's; its numbers are ``lr`` and ``t``.
        name: of the class.
        origin: the first paragraph of its docstring: what it is and where it came from.

    Raises:
        GenomeError: it is no optimizer, or ``name`` cannot name a class, or a condition is the same number always.
    """
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise GenomeError(f"name must be an identifier such as 'MyRule', got {name!r}")
    strange = [scalar for scalar in genome.scalars if scalar not in ("lr", "t")]
    if strange:
        raise GenomeError(f"a rule's numbers are lr and t, got {strange[0]!r}")
    lifted, hyper = _lifted(genome)
    program = _folded(lifted.program(named=True))
    used = {arg for s in program.statements for arg in s.args} | set(program.outputs)
    hyper = {key: value for key, value in hyper.items() if key in used}
    body = _RuleWriter(program, scalar=None).body()
    fields = [_field(key, value) for key, value in hyper.items()]
    fields += (
        [f"slots = ({', '.join(map(_quoted, genome.slots))}{',' * (len(genome.slots) == 1)})"] if genome.slots else []
    )
    arguments = [*program.tensors, *hyper, *(["t"] if "t" in used else [])]
    methods = [_COEFFICIENTS] * ("t" in used) + [_elementwise(arguments, body)]
    return _FILE.format(
        name=name,
        origin=textwrap.fill(" ".join(origin.split()), _WIDTH - 8)
        .replace("\n", "\n    ")
        .replace("\\", "/")
        .replace('"', "'"),
        text=textwrap.indent(genome.text().strip(), " " * 8),
        imports=_imports("\n".join([*fields, *methods])),
        fields="".join(f"    {line}\n" for entry in fields for line in entry.splitlines()),
        methods="".join(methods).removeprefix("" if fields else "\n"),
    )


# -- numbers with names --------------------------------------------------------------------------------------------------


def _lifted(genome: Genome) -> tuple[Genome, dict[str, float]]:
    """The same with names for the numbers that readers know, and these names' values."""
    body, found = _live(genome), {}
    taken = {*genome.tensors, *genome.scalars, *genome.outputs, *(a.target for a in body)}
    rate = _rate(body) if "lr" in genome.scalars else None
    if rate is not None:
        place, factor = rate
        body[place] = Assign(body[place].target, "copy", ("lr",))
    if "lr" in genome.scalars:
        found["lr"] = 1.0 if rate is None else factor
    names: dict[Arg, str] = {}
    for weight in _weights(body):
        names[weight] = next(name for k in range(1, 1000) if (name := f"beta{k}") not in taken)
        found[names[weight]] = weight
        taken.add(names[weight])
    renamed = [
        a._replace(args=tuple(names.get(arg, arg) if _is_number(arg) else arg for arg in a.args))
        if a.function in ("interpolate", "mul", "sub", "power")
        else a
        for a in body
    ]
    overwritten = next((k for k, a in enumerate(renamed) if a.target == genome.tensors[0]), len(renamed))
    for k, a in enumerate(renamed[:overwritten]):
        number = (
            a.args[1 - a.args.index(genome.tensors[0])] if a.function == "mul" and genome.tensors[0] in a.args else 0.0
        )
        if isinstance(number, float) and _common(number) and "weight_decay" not in taken:
            args = tuple("weight_decay" if arg == number else arg for arg in a.args)
            renamed[k], found["weight_decay"] = a._replace(args=args), number
            break
    scalars = (*genome.scalars, *(name for name in found if name not in genome.scalars))
    return Genome(genome.tensors, scalars, genome.outputs, tuple(renamed)), found


def _live(genome: Genome) -> list[Assign]:
    """The assignments that the result depends on."""
    live, kept = set(genome.outputs), []
    for a in reversed(genome.body):
        if a.target in live:
            live = (live - {a.target}) | {arg for arg in a.args if isinstance(arg, str)}
            kept.append(a)
    return kept[::-1]


def learning_rate(genome: Genome) -> float | None:
    """The positive number that multiplies ``lr``, where that is how ``lr`` is read; else None."""
    rate = _rate(_live(genome))
    return None if rate is None else rate[1]


def _rate(body: Sequence[Assign]) -> tuple[int, float] | None:
    """Where ``lr`` is read for the only time, if that multiplies it by a positive number; and the number."""
    readers = []
    for k, a in enumerate(body):
        readers += [k] if "lr" in a.args else []
        if a.target == "lr":
            break
    if len(readers) != 1 or body[readers[0]].function != "mul":
        return None
    factor = next((arg for arg in body[readers[0]].args if arg != "lr"), None)
    return (readers[0], factor) if isinstance(factor, float) and _common(factor) else None


def _weights(body: Sequence[Assign]) -> list[float]:
    """Numbers in (0, 1) that are weights of averages: of interpolate, in ``1 - x`` and in ``x ** t``."""
    found: list[Arg] = []
    for _, function, args in body:
        if function == "interpolate":
            found.append(args[2])
        elif function == "sub" and args[0] == 1.0:
            found.append(args[1])
        elif function == "power" and args[1] == "t":
            found.append(args[0])
    return list(dict.fromkeys(number for number in found if isinstance(number, float) and 0 < number < 1))


def _common(number: float) -> bool:
    """Whether a rate can be tuned around ``number``."""
    return 1e-12 <= number <= 1e6


def _is_number(arg: Arg) -> bool:
    return isinstance(arg, float)


def _field(name: str, value: float) -> str:
    """The declaration of a hyperparameter."""
    if name == "lr":
        return f"lr: float = learning_rate({value!r}, search=({_rounded(value / 100)!r}, {_rounded(value * 100)!r}))"
    if name.startswith("beta"):
        rest = _DECAY.format(low=0.5 if value >= 0.5 else _rounded(value / 2), high=max(0.9999, value))
    else:
        rest = _WEIGHT_DECAY.format(low=_rounded(value / 100), high=_rounded(value * 100))
    whole = f"{name}: float = hyper({value!r}, {rest})"
    return whole if len(whole) <= _WIDTH - 4 else f"{name}: float = hyper(\n    {value!r}, {rest}\n)"


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


# -- text ------------------------------------------------------------------------------------------------------------------


def _folded(program: Program) -> Program:
    """With the values of what depends on literals only, except ``1 - 0.9`` and the like, which Python computes in its place."""
    known: dict[Arg, float] = {}
    values: dict[Arg, Arg] = {}
    statements = []
    for s in program.statements:
        numbers = [known.get(arg, arg) for arg in s.args]
        args = tuple(values.get(arg, arg) for arg in s.args)
        if s.op == "where" and isinstance(numbers[0], float):
            branch = args[1] if numbers[0] else args[2]
            if s.target in program.element_names and branch not in program.element_names:
                raise GenomeError(
                    f"{s.target} chooses by {numbers[0]!r}, which never changes; simplify the program first"
                )
            values[s.target] = branch
            number = known.get(branch, branch)
            if isinstance(number, float):
                known[s.target] = number
            continue
        literals = [number for number in numbers if isinstance(number, float)]
        if s.op in OPS and len(literals) == len(numbers):
            known[s.target] = OPS[s.op].scalar(*literals)
            in_place = s.op in _IN_PLACE and literals == [*s.args]
            if not in_place or known[s.target] == 0:  # of integers, -0 is 0
                values[s.target] = known[s.target]
                continue
        if s.op in ("maximum", "minimum"):
            args = tuple(arg if isinstance(arg, str) and arg not in known else known.get(arg, arg) for arg in args)
        statements.append(Statement(s.target, s.op, args))
    outputs = tuple(values.get(out, out) for out in program.outputs)
    return without_dead(Program(program.scalars, program.tensors, tuple(statements), outputs))


_IN_PLACE = ("add", "sub", "mul", "neg")
_SWAPPED = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}
_SIMPLE = re.compile(r"-?(\d[\d.]*(e[+-]?\d+)?|[A-Za-z_]\w*)")


class _RuleWriter(Writer):
    """Prints what can be traced: torch functions also of scalars, comparisons as they are, no ``if``."""

    def is_scalar(self, arg: Arg) -> bool:
        """Numbers that are no literals are traced like tensors."""
        return isinstance(arg, float)

    def is_mask(self, arg: Arg) -> bool:
        """A comparison counts as a number without more ado."""
        return False

    def choice(self, s: Statement, scalar: bool) -> tuple[str, int]:
        """See the class."""
        condition, yes, no = (self.text(arg, 0) for arg in s.args)
        return f"torch.where({condition}, {yes}, {no})", 9

    def text(self, arg: Arg, minimum: int) -> str:
        """As formatters want numbers."""
        text = super().text(arg, minimum)
        return text.replace("e+", "e") if isinstance(arg, float) else text

    def expression(self, s: Statement) -> tuple[str, int]:
        """As formatters want powers, and linters comparisons with numbers."""
        if s.op in _SWAPPED and isinstance(s.args[0], float):
            s = Statement(s.target, _SWAPPED[s.op], s.args[::-1])
        text, precedence = super().expression(s)
        parts = text.split(" ** ")
        return ("**".join(parts) if len(parts) == 2 and all(map(_SIMPLE.fullmatch, parts)) else text), precedence

    def body(self) -> list[str]:
        """The lines of the function."""
        lines = self.lines(self.program.statements, keep=set())
        outputs = [self.text(out, 0) for out in self.program.outputs]
        whole = f"return {', '.join(outputs)}"
        if len(outputs) > 1 and len(whole) > _WIDTH - 8:
            return [*lines, "return (", *(f"    {out}," for out in outputs), ")"]
        return [*lines, whole]


def _elementwise(arguments: Sequence[str], body: Sequence[str]) -> str:
    head = f"    def elementwise(self, {', '.join(f'{name}: Any' for name in arguments)}) -> Any:"
    if len(head) > _WIDTH:
        entries = f"        self, {', '.join(f'{name}: Any' for name in arguments)}\n"
        if len(entries) > _WIDTH:
            entries = "".join(f"        {name},\n" for name in ["self", *(f"{name}: Any" for name in arguments)])
        head = f"    def elementwise(\n{entries}    ) -> Any:"
    lines = [f"        {line}" for line in ['"""See the class."""', *body]]
    return "\n".join(["", head, *lines, ""])


def _imports(text: str) -> str:
    tree = [f"global_{kind}" for kind in ("norm", "sum") if f"global_{kind}(" in text]
    matrix = [op for op in sorted(MATRIX_OPS) if f"{op}(" in text]
    rule = ["ElementwiseRule", *(["HyperValues"] if "HyperValues" in text else [])]
    space = [name for name in ("hyper", "learning_rate") if f"= {name}(" in text]
    modules = {"metaopt.matrix": matrix, "metaopt.program": tree, "metaopt.rule": rule, "metaopt.space": space}
    ours = [f"from {module} import {', '.join(names)}\n" for module, names in modules.items() if names]
    return "\nimport torch\n\n" * ("torch." in text) + "\n" * ("torch." not in text) + "".join(ours).rstrip()


def _quoted(name: str) -> str:
    return f'"{name}"'
