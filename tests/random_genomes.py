"""Random valid programs of the search language without functions of matrices, and tensors to run them on."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from population_cases import Machine, stacked
from torch import Tensor

from metaopt.program import REDUCTIONS, Program, Statement, evaluate_tree
from metaopt.program.population import PopulationStep, encode
from metaopt.program.source import function_source
from metaopt_symbolic.genome import Assign, Genome
from metaopt_symbolic.language import EXTRAS, FUNCTIONS, PAPER, Kind

SIZES = (3, 2)
"""Of the two tensors of a tree."""

CPU = torch.device("cpu")

SCALARS = {"lr": 0.37, "t": 3.0}

_CONSTANTS = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, 0.9, 1e-8, 1e15, 1e300, float("inf"), float("-inf"), float("nan"))
_SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-170, 1e170, float("inf"), float("-inf"), float("nan"))

_INEXACT = {"pow", "exp", "log", "tanh", "sin", "cos", "atan", "sqrt"}
"""Operations whose executions may differ in the last bits. So do quotients of a number by a tensor, of which torch makes
products, and sums; all others are correctly rounded everywhere."""


def random_genome(rng: np.random.Generator) -> Genome:
    """Two to twelve assignments of functions of all kinds to old and new variables; the last of them makes the update."""
    slots = ("m", "v")[: rng.integers(3)]
    tensors, scalars = ("w", "g", *slots), ("lr", "t")[: rng.integers(1, 3)]
    kinds = {**dict.fromkeys(tensors, Kind.TENSOR), **dict.fromkeys(scalars, Kind.SCALAR)}
    body = []
    for k in range(length := int(rng.integers(2, 13))):
        last = k == length - 1
        name = str(rng.choice(list(PAPER | EXTRAS)))
        function = FUNCTIONS[name]
        if last and (function.reduces or function.arity == 0):
            name, function = "mul", FUNCTIONS["mul"]
        args: list[str | float] = []
        for position in range(function.arity):
            must = position < function.of_tensors or (last and position == 0)
            fitting = [name for name, kind in kinds.items() if kind == Kind.TENSOR or not must]
            if not must and rng.random() < 0.25:
                args.append(float(rng.choice(_CONSTANTS) if rng.random() < 0.5 else rng.normal()))
            else:
                args.append(str(rng.choice([*fitting, *fitting[-3:] * 3])))  # what is new is likelier
        kind = max((kinds[arg] if isinstance(arg, str) else Kind.SCALAR for arg in args), default=Kind.SCALAR)
        kind = Kind.NUMBER if function.reduces else kind
        free = [*scalars, *(name for name in kinds if name.startswith("x")), f"x{k}", f"x{k}"]
        target = "update" if last else str(rng.choice([*free, *slots] if kind == Kind.TENSOR else free))
        body.append(Assign(target, name, tuple(args)))
        kinds.pop(target, None)  # so that the newest is last
        kinds[target] = kind
    return Genome(tensors, scalars, ("update", *slots), tuple(body))


def random_genomes(count: int, seed: int = 0) -> list[Genome]:
    """The first ``count`` of a seed."""
    rng = np.random.default_rng(seed)
    return [random_genome(rng) for _ in range(count)]


def random_tensors(programs: Sequence[Program], seed: int = 0) -> list[list[Tensor]]:
    """Per program its tensors, float64 [sum(SIZES)]: normal numbers, of every third program with a special one in each."""
    rng = np.random.default_rng(seed)
    rows = []
    for k, program in enumerate(programs):
        values = rng.normal(size=(len(program.tensors), sum(SIZES)))
        if k % 3 == 0:
            places = rng.integers(sum(SIZES), size=len(values))
            values[np.arange(len(values)), places] = rng.choice(_SPECIAL, size=len(values))
        rows.append([torch.from_numpy(row) for row in values])
    return rows


def noisy(program: Program, error: float, rng: np.random.Generator, also: Container[str] = ()) -> Program:
    """``program`` with a relative error of up to that size behind every operation that is not exact, ``also`` these."""
    statements: list[Statement] = []
    for s in program.statements:
        size = error * float(rng.uniform(-1, 1))
        product = s.op == "div" and (isinstance(s.args[0], float) or s.args[0] in program.scalar_names)
        if s.op in _INEXACT or s.op in also or product:
            statements += [
                Statement(f"{s.target}_", s.op, s.args),
                Statement(s.target, "mul", (f"{s.target}_", 1 + size)),
            ]
        elif s.op in REDUCTIONS:  # of the sum of sizes
            parts = {"_a": ("abs", s.args), "_b": (s.op, (f"{s.target}_a",)), "_c": ("mul", (f"{s.target}_b", size))}
            statements += [Statement(s.target + end, op, args) for end, (op, args) in parts.items()]
            statements += [Statement(f"{s.target}_d", s.op, s.args)]
            statements += [Statement(s.target, "add", (f"{s.target}_d", f"{s.target}_c"))]
        else:
            statements.append(s)
    return Program(program.scalars, program.tensors, tuple(statements), program.outputs)


# -- what all executions are compared with -------------------------------------------------------------------------------


def reference(programs: Sequence[Program], rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """New parameter and slots by `evaluate_tree`, in rows like the given ones."""
    found = []
    with torch.no_grad():
        for program, row in zip(programs, rows, strict=True):
            leaves = zip(*(tensor.split(SIZES) for tensor in row), strict=True)
            tree = [dict(zip(program.tensors, leaf, strict=True)) for leaf in leaves]
            found.append([torch.cat(parts) for parts in zip(*evaluate_tree(program, tree, SCALARS), strict=True)])
    return found


def side_by_side(
    machine: Machine, programs: Sequence[Program], rows: Sequence[Sequence[Tensor]], device: torch.device = CPU
) -> list[list[Tensor]]:
    """The same by one step of a population machine."""
    population, runs = encode(programs), torch.arange(len(programs), device=device)
    params, grads, slots = stacked(population, rows, device)
    (numbers,) = population.numbers(runs, SCALARS, params.dtype)
    machine(population, runs, SIZES)(params, grads, slots, numbers)
    return [[params[k].cpu(), *slots[: len(p.tensors) - 2, k].cpu()] for k, p in enumerate(programs)]


@dataclass(frozen=True)
class Expectation:
    """What correct executions may give.

    Entries are all alike (NaN, the same infinity, a number within ``bounds``) unless rounding errors alone decide which.

    Attributes:
        values: float64 [programs, outputs * elements], missing outputs 0.
        bounds: of the distance of finite values; 0 where a program has exact operations only.
        sure: whether values are of one kind under rounding errors.
    """

    values: Tensor
    bounds: Tensor
    sure: Tensor

    @classmethod
    def of(
        cls, programs: Sequence[Program], rows: Sequence[Sequence[Tensor]], error: float, also: Container[str] = ()
    ) -> Expectation:
        """By `reference`, and by programs with relative errors of up to ``error`` behind their operations (`noisy`)."""
        rng = np.random.default_rng(1)
        values = table(reference(programs, rows))
        bounds, sure = torch.zeros_like(values), torch.ones_like(values, dtype=torch.bool)
        for _ in range(4):
            shaken = [noisy(program, error, rng, also) for program in programs]
            others = table(side_by_side(PopulationStep, shaken, rows))
            sure &= _alike(values, others)
            bounds = torch.maximum(bounds, (values - others).abs().nan_to_num(0.0, 0.0, 0.0))
        inexact = [len(a.statements) > len(b.statements) for a, b in zip(shaken, programs, strict=True)]
        rounding = torch.tensor(inexact)[:, None] * 2.0**-51 * values.abs().nan_to_num(0.0, 0.0, 0.0)
        # errors of all four may happen to be small: twice as much room as four of them leave one entry of ten thousand outside
        return cls(values, 8 * bounds + rounding, sure)

    def check(self, found: Sequence[Sequence[Tensor]], programs: Sequence[Program]) -> None:
        """Fails with the first program that ``found`` is not an execution of."""
        values = table(found)
        finite = self.values.isfinite()
        alike = _alike(self.values, values) & (~finite | ((values - self.values).abs() <= self.bounds))
        # an infinity minus a product that overflows is NaN, and infinity where a processor does both as one operation
        alike |= self.values.isnan() & values.isinf() & torch.tensor([_fuses(p) for p in programs])[:, None]
        wrong = (self.sure & ~alike).any(1).nonzero().flatten().tolist()
        if wrong:
            k = wrong[0]
            raise AssertionError(
                f"{len(wrong)} of {len(values)} programs differ, the first is number {k}:\n"
                f"{function_source(programs[k], 'update')}\nwanted {self.values[k].tolist()}\nfound {values[k].tolist()}"
            )


def table(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """One row per program, as in `Expectation.values`."""
    missing = torch.zeros(sum(SIZES), dtype=torch.float64)
    return torch.stack([torch.cat([*row, *[missing] * (3 - len(row))]) for row in rows])


def _fuses(program: Program) -> bool:
    """Whether a product is added to something."""
    products = {s.target for s in program.statements if s.op == "mul"}
    return any(s.op in ("add", "sub") and not products.isdisjoint(s.args) for s in program.statements)


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """Both NaN, both the same infinity, or both finite."""
    return (x.isnan() & y.isnan()) | (x == y) | (x.isfinite() & y.isfinite())
