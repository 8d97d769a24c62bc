"""Ten thousand random valid programs: text and program say the same, and all ways to run one compute the same.

Functions of matrices are not among them: see `test_matrices`.

Entries that are NaN or infinite must be so in every execution, and where a program has exact operations only, all bits of the
others agree too. Else finite values may differ by what relative errors of 2^-50 (8 units in the last place; vector forms of
functions are off by up to 4) behind each operation that is not exact make of them; where such errors decide whether a value
is finite at all (three entries of a thousand), nothing is compared.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from random_genomes import SCALARS, SIZES, Expectation, random_genomes, random_tensors, reference, side_by_side, table
from torch import Tensor

from metaopt.export.module import module_source
from metaopt.program import Program, compile_in_place, parse_program, python_source
from metaopt.program.population import PopulationStep
from metaopt.program.population_cpp import machine_library
from metaopt.program.source import function_source
from metaopt.rule import ElementwiseRule
from metaopt.space import hyper
from metaopt_symbolic.genome import Genome, from_json, parse
from metaopt_symbolic.language import EXTRAS, PAPER

COUNT = 10_000
ERROR = 2.0**-50

GENOMES = random_genomes(COUNT)
PROGRAMS = [genome.program() for genome in GENOMES]
ROWS = random_tensors(PROGRAMS)


@pytest.fixture(scope="module")
def expectation() -> Expectation:
    return Expectation.of(PROGRAMS, ROWS, ERROR)


def test_the_programs_are_of_the_whole_language(expectation: Expectation) -> None:
    assert {a.function for genome in GENOMES for a in genome.body} == {*PAPER, *EXTRAS}
    assert {s.op for p in PROGRAMS for s in p.statements} >= {
        "mean",
        "norm",
        "global_sum",
        "global_norm",
        "where",
        "pow",
    }
    reach = [p.reach for p in PROGRAMS]
    assert min(map(reach.count, ("element", "tensor", "tree"))) > 100
    present = torch.arange(expectation.values.shape[1]) < sum(SIZES) * torch.tensor(
        [[len(p.tensors) - 1] for p in PROGRAMS]
    )
    special = present & ~expectation.values.isfinite()
    assert 0.05 < special.sum() / present.sum() < 0.3
    assert expectation.sure.double().mean() > 0.99  # what is compared
    assert (expectation.bounds == 0).all(1).double().mean() > 0.2  # to the bit


def _spelling(genome: Genome) -> str:
    return json.dumps(genome.to_json())  # NaN != NaN


def test_text_and_json_give_the_same_candidate_back() -> None:
    for genome in GENOMES:
        assert _spelling(parse(genome.text())) == _spelling(genome)
        assert parse(genome.text()).text() == genome.text()
        assert _spelling(from_json(json.loads(_spelling(genome)))) == _spelling(genome)


@pytest.mark.parametrize("write", [lambda p: function_source(p, "update"), python_source], ids=["one", "two"])
def test_programs_come_back_from_their_source(write: Any, expectation: Expectation) -> None:
    back = [parse_program(write(program)) for program in PROGRAMS]
    torch.testing.assert_close(table(reference(back, ROWS)), expectation.values, rtol=0, atol=0, equal_nan=True)
    # a minus before a literal becomes part of it; apart from that, nothing changes
    again = [write(program) for program in back]
    assert [write(parse_program(text)) for text in again] == again


@pytest.mark.parametrize("execution", ["C++", "torch"])
def test_population_machines_agree(execution: str, expectation: Expectation, monkeypatch: pytest.MonkeyPatch) -> None:
    if execution == "torch":
        monkeypatch.setenv("METAOPT_CXX", "")
    elif machine_library(torch.float64) is None:
        pytest.skip("no C++ compiler: set CXX or install g++")
    expectation.check(side_by_side(PopulationStep, PROGRAMS, ROWS), PROGRAMS)


def test_generated_in_place_torch_agrees() -> None:
    """Programs without reductions; it fuses products and sums (addcmul, lerp), so no operation is exact."""
    chosen = [k for k, p in enumerate(PROGRAMS) if p.reach == "element"]
    programs, rows = [PROGRAMS[k] for k in chosen], [ROWS[k] for k in chosen]
    found = []
    for program, row in zip(programs, rows, strict=True):
        columns = [tensor.clone() for tensor in row]
        compile_in_place(program, lists=False)(columns, program.scalar_values(SCALARS))
        found.append([columns[0], *columns[2:]])
    fused = Expectation.of(programs, rows, ERROR, also=("add", "sub", "mul", "div"))
    assert fused.sure.double().mean() > 0.99
    fused.check(found, programs)


class _Found(ElementwiseRule):
    """A rule that is nothing but its program."""

    lr: float = hyper(SCALARS["lr"])

    def elementwise(self, *arguments: Any, **coefficients: Any) -> Any:
        raise AssertionError("the program is given")


class _OneSlot(_Found):
    slots: ClassVar[tuple[str, ...]] = ("m",)


class _TwoSlots(_Found):
    slots: ClassVar[tuple[str, ...]] = ("m", "v")


def test_exported_optimizers_agree(expectation: Expectation) -> None:
    """As generated torch too: its source is what an exported optimizer calls."""
    found = []
    for program, row in zip(PROGRAMS, ROWS, strict=True):
        rule = (_Found, _OneSlot, _TwoSlots)[len(program.tensors) - 2]()
        object.__setattr__(rule, "program", program)
        text, _ = module_source(rule, "Found", Path("found.py"))
        namespace: dict[str, Any] = {"__name__": "found"}
        exec(compile(text, "found.py", "exec"), namespace)
        found.append(_stepped(namespace["Found"], program, row))
    expectation.check(found, PROGRAMS)


def _stepped(optimizer: Any, program: Program, row: list[Tensor]) -> list[Tensor]:
    """New parameter and slots of a step with the state given."""
    columns = [[part.clone() for part in tensor.split(SIZES)] for tensor in row]
    params = [torch.nn.Parameter(param) for param in columns[0]]
    made = optimizer(params)
    for k, param in enumerate(params):
        param.grad = columns[1][k]
        slots = {name: column[k] for name, column in zip(program.tensors[2:], columns[2:], strict=True)}
        made.state[param] = {"step": int(SCALARS["t"]) - 1, **slots}
    made.step()
    after = [[param.detach() for param in params]]
    after += [[made.state[param][name] for param in params] for name in program.tensors[2:]]
    return [torch.cat(parts) for parts in after]


def test_state_is_no_alias_of_the_parameter() -> None:
    """A slot that becomes one of its inputs by a condition must not change when the parameter does."""
    genome = parse("def f(w, g, m, lr):\n    m = where(lr, w, g)\n    update = mul(g, lr)\n    return update, m\n")
    rule = _OneSlot()
    object.__setattr__(rule, "program", genome.program())
    namespace: dict[str, Any] = {"__name__": "found"}
    exec(module_source(rule, "Found", Path("found.py"))[0], namespace)
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    param.grad = torch.ones(2)
    made = namespace["Found"]([param])
    made.step()
    torch.testing.assert_close(made.state[param]["m"], torch.tensor([1.0, -2.0]), rtol=0, atol=0)
    assert math.isclose(param[0].item(), 1 - SCALARS["lr"], rel_tol=1e-6)
