"""Steps of 64 different programs: the register machine in C++ and in torch operations, beside one program after another.

    python benchmarks/population.py [--sizes 100 1000 10000] [--steps 10] [--out FILE.json]

One core. The programs are what symbolic search breeds from AdamW by a few mutations, and every program has one run. One after
another they run by `evaluate`, and as C++ that is generated for each, whose compilation (a minute) is not counted. All sides
take the same steps, which are compared first. They take turns; a figure is the best of its rounds, in steps of one run per
second of CPU time. Encoding is timed too. The machine on a GPU is measured by ``gpu/population_steps.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import unittest.mock as mock
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaopt import registry
from metaopt.program import OPS, Program, Statement, compile_cpp, evaluate
from metaopt.program.population import Population, PopulationStep, encode
from metaopt.rule import flat_hp

CPU = torch.device("cpu")
PROGRAMS = 64
ROUNDS = 5


def mutants(count: int, mutations: int = 6) -> list[Program]:
    """AdamW after some mutations: insert a statement at random, and let a later statement read it."""
    draw = random.Random(0)
    ancestor = registry.create("optimizer", "adamw").program
    made = []
    for _ in range(count):
        statements = list(ancestor.statements)
        for k in range(draw.randint(1, mutations)):
            at = draw.randrange(len(statements))
            known = [*ancestor.tensors, *ancestor.scalars, *(s.target for s in statements[:at]), draw.gauss(0, 1)]
            op = draw.choice(list(OPS))
            statements.insert(at, Statement(f"inserted{k}", op, tuple(draw.choices(known, k=OPS[op].arity))))
            reader = draw.randrange(at + 1, len(statements))
            target, name, args = statements[reader].target, statements[reader].op, list(statements[reader].args)
            args[draw.randrange(len(args))] = f"inserted{k}"
            statements[reader] = Statement(target, name, tuple(args))
        made.append(Program(ancestor.scalars, ancestor.tensors, tuple(statements), ancestor.outputs))
    return made


def start(population: Population, count: int, size: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters and gradients [R, P], and slots [S, R, P] of zeros."""
    generator = torch.Generator().manual_seed(0)
    params, grads = (torch.randn(count, size, generator=generator).to(device) for _ in range(2))
    return params, grads, params.new_zeros(population.kernel.inputs - 2, count, size)


def scalars(steps: int) -> dict[str, float | Tensor]:
    """AdamW's defaults, and ``t`` of the first steps."""
    hp = flat_hp(registry.create("optimizer", "adamw").hp)
    return {**hp, "t": torch.arange(1, steps + 1, dtype=torch.float64)[None]}


def by_machine(programs: list[Program], size: int, steps: int) -> Callable[[], Tensor]:
    """A call that takes the steps, and gives the parameters."""
    population = encode(programs)
    runs = torch.arange(len(programs))
    step = PopulationStep(population, runs)
    first, grads, zeros = start(population, len(programs), size)
    numbers = population.numbers(runs, scalars(steps))

    def call() -> Tensor:
        params, slots = first.clone(), zeros.clone()
        for now in numbers:
            step(params, grads, slots, now)
        return params

    return call


def by_torch(programs: list[Program], size: int, steps: int) -> Callable[[], Tensor]:
    """As `by_machine`, but without a compiler."""
    machine = by_machine(programs, size, steps)

    def call() -> Tensor:
        with mock.patch.dict(os.environ, METAOPT_CXX=""):
            return machine()

    return call


def by_generated(programs: list[Program], size: int, steps: int) -> Callable[[], Tensor]:
    """One program after another, each in C++ of its own."""
    first, grads, zeros = start(encode(programs), len(programs), size)
    compiled = [compile_cpp(program, *[torch.float32] * 3) for program in programs]
    numbers = [[p.scalar_values({**scalars(1), "t": float(t)}) for t in range(1, steps + 1)] for p in programs]

    def call() -> Tensor:
        params, slots = first.clone(), zeros.clone()
        for k, step in enumerate(compiled):
            assert step is not None
            columns = [[params[k]], [grads[k]], *([slot[k]] for slot in slots)]
            for now in numbers[k]:
                step(columns, now)
        return params

    return call


def by_turns(programs: list[Program], size: int, steps: int) -> Callable[[], Tensor]:
    """One program after another, by `evaluate`."""
    first, grads, slots = start(encode(programs), len(programs), size)

    @torch.no_grad()
    def call() -> Tensor:
        params = first.clone()
        hp = scalars(1)
        for k, program in enumerate(programs):
            state = [params[k], *slots[:, k]]
            for t in range(1, steps + 1):
                inputs = dict(zip(program.tensors, [state[0], grads[k], *state[1:]], strict=True))
                state = evaluate(program, inputs, {**hp, "t": float(t)})
            params[k] = state[0]
        return params

    return call


def steps_per_second(calls: dict[str, Callable[[], Tensor]], taken: int) -> dict[str, float]:
    """Of each, which take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - began)
    return {name: taken / seconds for name, seconds in best.items()}


def microseconds_to_encode(count: int = 1000) -> float:
    """Of one program that nothing is known about yet."""
    made = mutants(count)
    began = time.process_time()
    encode(made)
    return (time.process_time() - began) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000], help="parameters of a run")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "population.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    programs = mutants(PROGRAMS)
    table = Table(title=f"steps of one run per CPU-second, {PROGRAMS} programs, one core")
    names = ("evaluate", "torch machine", "generated C++", "C++ machine")
    for column in ("parameters", *names):
        table.add_column(column, justify="right")
    rows = []
    for size in given.sizes:
        sides = (by_turns, by_torch, by_generated, by_machine)
        calls = {name: side(programs, size, given.steps) for name, side in zip(names, sides, strict=True)}
        wanted, *others = [call() for call in calls.values()]
        for found in others:  # a jump or a cancellation makes much of an ulp, in a few elements
            apart = ~torch.isclose(found, wanted, rtol=1e-3, atol=1e-5, equal_nan=True)
            assert apart.double().mean() < 1e-3, apart.nonzero()
        speeds = steps_per_second(calls, PROGRAMS * given.steps)
        table.add_row(f"{size:,}", *(f"{speed:,.0f}" for speed in speeds.values()))
        rows.append({"parameters": size, "steps_per_second": speeds})
    console = Console()
    console.print(table)
    encoding = microseconds_to_encode()
    console.print(f"encoding: {encoding:.0f} us of a program")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "programs": PROGRAMS, "steps": given.steps, "rows": rows}
    content["microseconds_to_encode"] = encoding
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
