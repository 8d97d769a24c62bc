"""Hypothesis strategies: programs on which every execution must agree, and tensors to run them on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from metaopt.program import OPS, REDUCTIONS, Program, Statement, evaluate

SCALARS = {"c1": 0.5, "c2": -2.0, "c3": 1.0}

EXACT = {"add": 2, "sub": 2, "mul": 2, "neg": 1, "abs": 1, "sign": 1, "maximum": 2, "minimum": 2, "where": 3,
         "gt": 2, "lt": 2, "ge": 2, "le": 2}  # fmt: skip
"""On small integers and halves these are exact in float64, in whatever order and fusion they are computed."""

SMOOTH = {"add": 2, "mul": 2, "div": 2, "sqrt": 1, "maximum": 2, "minimum": 2, "pow": 2, "tanh": 1}
"""These keep positive numbers positive and well conditioned: no cancellation, no jump."""

_MOST_MULTIPLICATIONS = 4  # ((x**2)**2)...: 4 squarings of numbers below 8 keep within the 53 bits of float64


@st.composite
def exact_programs(draw: st.DrawFn) -> Program:
    """Programs whose executions must agree bit for bit on `small_integers` in float64."""
    return draw(_programs(EXACT, constants=(0.0, 1.0, -1.0, 2.0, 0.5)))


@st.composite
def smooth_programs(draw: st.DrawFn) -> Program:
    """Programs whose executions must agree to a few ulp on `positive` tensors."""
    return draw(_programs(SMOOTH, constants=(1.0, 0.3, 1.7)))


@st.composite
def reducing_programs(draw: st.DrawFn) -> Program:
    """Smooth programs with reductions, whose sums are of positive numbers only."""
    return draw(_programs(SMOOTH, constants=(1.0, 0.3, 1.7), reductions=True))


@st.composite
def _programs(draw: st.DrawFn, ops: dict[str, int], constants: Sequence[float], reductions: bool = False) -> Program:
    tensors = ("param", "grad", *("first", "second")[: draw(st.integers(0, 2))])
    smooth = ops is SMOOTH
    scalars = ("c1", "c3") if smooth else ("c1", "c2", "c3")
    values: list[str | float] = [*tensors, *tensors, *scalars]
    statements: list[Statement] = []
    truths: list[str] = []
    elements = [*tensors]
    multiplications = 0
    for k in range(draw(st.integers(0, 9))):
        if reductions and draw(st.integers(0, 2)) == 0:
            reduced = draw(st.sampled_from([*elements, *elements[-2:]]))
            statements.append(Statement(f"v{k}", draw(st.sampled_from(sorted(REDUCTIONS))), (reduced,)))
            values += [f"v{k}"] * 2
            continue
        arithmetic = [op for op in ("add", "sub", "mul", "div") if op in ops]  # likelier: it is what gets folded
        allowed = [
            op for op in [*ops, *arithmetic * 2] if op != "mul" or smooth or multiplications < _MOST_MULTIPLICATIONS
        ]
        op = draw(st.sampled_from(allowed))
        candidates = [*values, *values[-4:] * 2, *constants]
        args: list[str | float] = [draw(st.sampled_from(candidates)) for _ in range(ops[op])]
        if op == "where":
            args[0] = draw(st.sampled_from([*truths, "c1", "c3"]))
        if op == "pow":
            args = [draw(st.sampled_from(tensors)), draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, -1.0, 1.5, "c1"]))]
        if all(isinstance(arg, float) or arg in scalars for arg in args):
            args[-1] = draw(st.sampled_from(tensors))  # scalar statements have tests of their own
        multiplications += op == "mul"
        target = f"v{k}"
        statements.append(Statement(target, op, tuple(args)))
        values.append(target)
        if not set(args).isdisjoint(elements):
            elements.append(target)
        if op in ("gt", "lt", "ge", "le"):
            truths.append(target)
    outputs = [draw(st.sampled_from([*values, *values[-3:], constants[0]])) for _ in range(len(tensors) - 1)]
    return Program(scalars, tensors, tuple(statements), tuple(outputs))


def every_form() -> Program:
    """One slot per operation and kind of argument, so that one build covers them all."""
    statements: list[Statement] = []
    for op, arity in ((name, op.arity) for name, op in OPS.items()):
        if op == "where":
            truth = f"v{next(i for i, s in enumerate(statements) if s.op == 'gt')}"
            forms: list[tuple[str | float, ...]] = [(truth, "param", "grad"), (truth, 2.0, 0.5), ("c1", "param", 1.0)]
        elif arity == 1:
            forms = [("param",)]
        else:
            pairs = [("param", "grad"), ("param", "c2"), ("c2", "param"), ("param", float("nan"))]
            forms = [*pairs, ("param", 0.5), ("param", 2.0), (1.0, "param"), (float("inf"), "param"), ("param", 0.0)]
        statements += [Statement(f"v{len(statements) + k}", op, form) for k, form in enumerate(forms)]
    slots = tuple(f"slot{k}" for k in range(len(statements)))
    outputs = ("param", *(s.target for s in statements))
    return Program(("c1", "c2"), ("param", "grad", *slots), tuple(statements), outputs)


def small_integers(program: Program, sizes: Sequence[int] = (5, 1, 40), seed: int = 0) -> list[list[Tensor]]:
    """Columns of float64 tensors with entries in -3..3."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(-3, 4, (n,), generator=generator).to(torch.float64) for n in sizes] for _ in program.tensors]


def positive(program: Program, dtype: torch.dtype, sizes: Sequence[int] = (5, 1, 40)) -> list[list[Tensor]]:
    """Columns of tensors with entries in [0.5, 2)."""
    generator = torch.Generator().manual_seed(0)
    return [
        [0.5 + 1.5 * torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]
        for _ in program.tensors
    ]


def special(program: Program, dtype: torch.dtype) -> list[list[Tensor]]:
    """Every pair of a parameter and a gradient that arithmetic has rules for; slots are 0."""
    numbers = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2.5, -2.5], dtype=dtype)
    left, right = (pair.reshape(-1) for pair in torch.meshgrid(numbers, numbers, indexing="ij"))
    return [[left], [right], *([torch.zeros_like(left)] for _ in program.tensors[2:])]


def expected(program: Program, columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What every column holds after a step, by `evaluate`; the gradients as they were."""
    rows = []
    for tensors in zip(*columns, strict=True):
        outputs = evaluate(program, dict(zip(program.tensors, tensors, strict=True)), SCALARS)
        rows.append([out.clone() for out in (outputs[0], tensors[1], *outputs[1:])])
    return [list(column) for column in zip(*rows, strict=True)]


def copied(columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Columns of fresh tensors."""
    return [[tensor.clone() for tensor in column] for column in columns]


def coefficients(program: Program) -> dict[str, float]:
    """The kernel's coefficients at `SCALARS`."""
    return program.scalar_values(SCALARS)
