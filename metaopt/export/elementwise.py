"""The source of an `ElementwiseRule`, printed from its Program: needs no source file of the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from metaopt.program.program import Arg, Program
from metaopt.program.source import function_source
from metaopt.rule import ElementwiseRule, TensorRule
from metaopt.space import Hyper

GUARDS = {
    "div": '''def _div(x, y):
    """x / y of floats, where a zero divisor gives infinity or NaN."""
    return x / y if y else x * math.copysign(math.inf, y)''',
    "sqrt": '''def _sqrt(x):
    """The root of a float; NaN below zero."""
    return math.sqrt(x) if x >= 0 else math.nan''',
    "log": '''def _log(x):
    """The logarithm of a float; -infinity at zero, NaN below."""
    return math.log(x) if x > 0 else (math.nan if x else -math.inf)''',
    "exp": '''def _exp(x):
    """exp of a float; infinity where it overflows."""
    return math.inf if x > 709.782712893384 else math.exp(x)''',
    "pow": '''def _pow(x, y):
    """x ** y of floats, as torch has it: infinity where it overflows, NaN where it is not real."""
    return (torch.tensor(x, dtype=torch.float64) ** y).item()''',
    "maximum": '''def _maximum(x, y):
    """The larger of two floats; NaN if either is."""
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)''',
    "minimum": '''def _minimum(x, y):
    """The smaller of two floats; NaN if either is."""
    return math.nan if math.isnan(x) or math.isnan(y) else min(x, y)''',
    "sin": '''def _sin(x):
    """The sine of a float; NaN of infinity."""
    return math.sin(x) if math.isfinite(x) else math.nan''',
    "cos": '''def _cos(x):
    """The cosine of a float; NaN of infinity."""
    return math.cos(x) if math.isfinite(x) else math.nan''',
}
"""Scalar arithmetic as programs define it, for statements whose arguments may leave what Python's own allows."""


def is_printable(rule: object) -> bool:
    """Whether the whole rule is its Program and slots whose initial values are known."""
    if not isinstance(rule, ElementwiseRule):
        return False
    inherited = {
        "init": TensorRule, "update": ElementwiseRule, "init_tensor": ElementwiseRule, "update_tensor": ElementwiseRule
    }  # fmt: skip
    own = any(getattr(type(rule), name) is not getattr(base, name) for name, base in inherited.items())
    return not own and not rule.requirements() and slot_values(rule) is not None


def slot_values(rule: ElementwiseRule, hp: str = "hp") -> dict[str, str] | None:
    """An expression in ``param`` and ``hp`` for each slot's initial value; None if one cannot be told from outside."""
    found = {}
    for slot in rule.slots:
        expression = _slot_value(rule, slot, hp)
        if expression is None:
            return None
        found[slot] = expression
    return found


def _slot_value(rule: ElementwiseRule, slot: str, hp: str) -> str | None:
    if type(rule).init_slot is ElementwiseRule.init_slot:
        return "torch.zeros_like(param)"
    probe = torch.linspace(-1.7, 2.3, 6, dtype=torch.float64).reshape(2, 3)
    value = rule.init_slot(slot, probe)
    if torch.equal(value, probe):
        return "param.clone()"
    constant = _constant(value)
    if constant is None or value.shape != probe.shape or _constant(rule.init_slot(slot, probe - 5.0)) != constant:
        return None
    for name, declared in rule.declared().items():
        if isinstance(declared, Hyper) and rule.values()[name] == constant:
            other = next(x for x in (constant / 2 + 0.25, constant / 2, constant + 1.0) if declared.contains(x))
            if _constant(rule.replaced(**{name: other}).init_slot(slot, probe)) == other != constant:
                return f'torch.full_like(param, {hp}["{name}"])'
    return f"torch.full_like(param, {constant!r})" if constant else "torch.zeros_like(param)"


def _constant(value: torch.Tensor) -> float | None:
    first = value.flatten()[0]
    return float(first) if bool((value == first).all()) else None


def update_function(rule: ElementwiseRule, name: str) -> tuple[str, list[str]]:
    """The update of one tensor as a function, and the `GUARDS` that it calls."""
    program = rule.program
    guarded = _unsafe(program, _domains(rule))
    doc = "New values of one tensor and its state."
    if "t" in _used(program):
        doc = "New values of one tensor and its state; ``t`` counts its updates from 1."
    return _wrapped(function_source(program, name, doc, guarded)), sorted(set(guarded.values()))


def _wrapped(source: str) -> str:
    """A signature that is too long gets one line for tensors and one for scalars."""
    first, _, body = source.partition("\n")
    if len(first) <= 110:
        return source
    head, _, arguments = first.removesuffix("):").partition("(")
    lines = [f"    {part}," for part in arguments.replace(", *, ", "|*, ").split("|")]
    return "\n".join([f"{head}(", *(line for long in lines for line in _broken(long)), "):", body])


def _broken(line: str) -> list[str]:
    """``line`` cut at commas into lines of at most 100 columns."""
    indent = line[: len(line) - len(line.lstrip())]
    cut: list[str] = []
    for item in line.strip().removesuffix(",").split(", "):
        if cut and len(cut[-1]) + len(item) + 2 <= 100:
            cut[-1] += f" {item},"
        else:
            cut.append(f"{indent}{item},")
    return cut


def call_lines(rule: ElementwiseRule, function: str, targets: str, tensors: list[str], hp: str, t: str) -> list[str]:
    """``targets = function(*tensors, ...)`` on values of ``hp``, with the tuples among them unpacked before."""
    used = _used(rule.program)
    lines, scalars = [], []
    for name, value in rule.hp.items():
        if isinstance(value, tuple):
            flat = flat_names(name, value)
            if used & set(flat):
                lines.append(f'{", ".join(flat)} = map(float, {hp}["{name}"])')
            scalars += [f"{entry}={entry}" for entry in flat if entry in used]
        elif name in used:
            scalars.append(f'{name}=float({hp}["{name}"])')
    scalars += [f"t={t}"] if "t" in used else []
    arguments = [line for part in (tensors, scalars) if part for line in _broken(f"    {', '.join(part)}")]
    return [*lines, f"{targets} = {function}(", *arguments, ")"]


def flat_names(name: str, value: tuple[float, ...]) -> list[str]:
    """``betas`` -> ``beta1, beta2``, as `metaopt.rule.flat_hp` does."""
    return [f"{name.removesuffix('s')}{i + 1}" for i in range(len(value))]


def _used(program: Program) -> set[Arg]:
    return {arg for s in program.statements for arg in s.args} | set(program.outputs)


def _domains(rule: ElementwiseRule) -> dict[str, Hyper]:
    found: dict[str, Hyper] = {}
    for name, declared in rule.declared().items():
        if isinstance(declared, Hyper):
            default = declared.default
            flat = flat_names(name, default) if isinstance(default, tuple) else [name]
            found |= dict.fromkeys(flat, declared)
    return found


def _unsafe(program: Program, domains: Mapping[str, Hyper]) -> dict[str, str]:
    """Scalar statements that Python may refuse (a zero divisor, a negative root) -> the op that guards them."""
    positive, below_one, finite = {"t"}, set(), {"t", *domains}
    one_less: set[Arg] = set()  # 1 - x of an x in [0, 1): no number of these is below 1e-16
    for name, domain in domains.items():
        if domain.low > 0 or (domain.low == 0 and domain.open_low):
            positive.add(name)
        if domain.low >= 0 and (domain.high < 1 or (domain.high == 1 and domain.open_high)):
            below_one.add(name)

    def is_positive(arg: Arg) -> bool:
        return arg > 0 if isinstance(arg, float) else arg in positive

    def is_number(arg: Arg) -> bool:
        return not math.isnan(arg) if isinstance(arg, float) else arg in finite | positive | below_one

    unsafe = {}
    for s in program.prelude:
        x, *rest = s.args
        y = rest[0] if rest else x
        at_least_one = y == "t" or (isinstance(y, float) and y >= 1)
        decays = s.op == "pow" and x in below_one and at_least_one
        tame = s.op == "pow" and x in one_less and isinstance(y, float) and abs(y) <= 10
        if s.op == "sub" and x == 1.0 and y in below_one:
            one_less.add(s.target)
        # products and quotients of positive numbers may be 0
        if (s.op in ("add", "sqrt") and is_positive(x) and is_positive(y)) or tame or s.target in one_less:
            positive.add(s.target)
        if decays or (s.op == "mul" and x in below_one and y in below_one):
            below_one.add(s.target)
        fine = {
            "div": is_positive(y) or (isinstance(y, float) and y != 0),
            "sqrt": is_positive(x),
            "log": is_positive(x),
            "pow": decays or tame,
            "maximum": is_number(x) and is_number(y),
            "minimum": is_number(x) and is_number(y),
        }
        if s.op in GUARDS and not fine.get(s.op):
            unsafe[s.target] = s.op
    return unsafe
