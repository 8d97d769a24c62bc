"""The register machine of a population computes what `evaluate_tree` computes for each program alone, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from population_cases import RULES, after, every_reduction, every_statement, expected, trained
from random_programs import exact_programs, positive, reducing_programs, small_integers, smooth_programs, special
from torch import Tensor

import metaopt
from metaopt.program import OPS, Program, Statement
from metaopt.program.encoding import OPERATIONS
from metaopt.program.population import PopulationStep, encode
from metaopt.program.population_cpp import machine_library

SIZES = (700, 1, 0, 599)
"""Of the tensors in a row: some end within a block of the machine in C++, and one has no elements."""

CPU = torch.device("cpu")
SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture(params=["C++", "torch"], scope="module", autouse=True)
def execution(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on both machines."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("METAOPT_CXX", "")
        elif machine_library(SINGLE) is None:
            pytest.skip("no C++ compiler: set CXX or install g++")
        yield


def program(*statements: tuple[str, str, tuple[str | float, ...]], outputs: tuple[str | float, ...]) -> Program:
    slots = ("first", "second")[: len(outputs) - 1]
    return Program(("c1", "c2"), ("param", "grad", *slots), tuple(Statement(*s) for s in statements), outputs)


# -- agreement ---------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(programs=st.lists(exact_programs(), min_size=20, max_size=20))
def test_different_programs_step_side_by_side(programs: list[Program]) -> None:
    for dtype in (DOUBLE, SINGLE):
        integers = [
            [column[0].to(dtype) for column in small_integers(p, sizes=(40,), seed=k)] for k, p in enumerate(programs)
        ]
        torch.testing.assert_close(
            after(PopulationStep, programs, integers, CPU), expected(programs, integers), rtol=0, atol=0
        )
        odd = [[column[0] for column in special(p, dtype)] for p in programs]
        torch.testing.assert_close(
            after(PopulationStep, programs, odd, CPU), expected(programs, odd), rtol=0, atol=0, equal_nan=True
        )


REAL = ((DOUBLE, 1e-13), (SINGLE, 1e-4))
"""Vector forms of pow and tanh may be an ulp off, sums are added up in other orders, and errors grow."""


@settings(max_examples=10)
@given(programs=st.lists(smooth_programs(), min_size=20, max_size=20))
def test_real_arithmetic_agrees_to_rounding(programs: list[Program]) -> None:
    for dtype, rtol in REAL:
        tensors = [[column[0] for column in positive(p, dtype, sizes=(40,))] for p in programs]
        torch.testing.assert_close(
            after(PopulationStep, programs, tensors, CPU), expected(programs, tensors), rtol=rtol, atol=0
        )


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_every_operation_has_torchs_special_cases(dtype: torch.dtype) -> None:
    programs = every_statement()
    assert {s.op for p in programs for s in p.statements} == set(OPS)
    tensors = [[column[0] for column in special(p, dtype)] for p in programs]
    torch.testing.assert_close(
        after(PopulationStep, programs, tensors, CPU), expected(programs, tensors),
        rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0, -0.5, -1.0, -2.0, 0.0, 4.0])
def test_powers_by_numbers_are_those_of_torch(exponent: float) -> None:
    powers = [program(("x", "pow", ("param", exponent)), outputs=("x",))]
    tensors = [[column[0] for column in special(powers[0], DOUBLE)]]
    ((found,),), ((wanted,),) = after(PopulationStep, powers, tensors, CPU), expected(powers, tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("size", [33, 1100])
def test_rules_train_side_by_side_with_their_own_hyperparameters(size: int, dtype: torch.dtype) -> None:
    runs = [(name, lr) for lr in (1e-3, 0.1) for name in RULES]
    found, wanted = trained(PopulationStep, runs, dtype, steps=5, size=size, device=CPU)
    # preludes are computed on tensors here and on floats there: their powers of beta may be an ulp of float64 apart
    torch.testing.assert_close(found, wanted, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@settings(max_examples=10)
@given(programs=st.lists(reducing_programs(), min_size=10, max_size=10))
def test_reductions_over_tensors_and_trees_agree_to_rounding(programs: list[Program]) -> None:
    for dtype, rtol in REAL:
        tensors = [[column[0] for column in positive(p, dtype, sizes=(sum(SIZES),))] for p in programs]
        found = after(PopulationStep, programs, tensors, CPU, SIZES)
        torch.testing.assert_close(found, expected(programs, tensors, SIZES), rtol=rtol, atol=0)


@pytest.mark.parametrize("sizes", [SIZES, None])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_reductions_of_both_signs_are_exact_in_sums_of_halves(
    dtype: torch.dtype, sizes: tuple[int, ...] | None
) -> None:
    programs = every_reduction()
    tensors = [
        [t[0].to(dtype) / 2 for t in small_integers(p, sizes=(sum(SIZES),), seed=k)] for k, p in enumerate(programs)
    ]
    found, wanted = after(PopulationStep, programs, tensors, CPU, sizes), expected(programs, tensors, sizes)
    torch.testing.assert_close(found[:-1], wanted[:-1], rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
    # the last one sums what has been rounded, of both signs
    torch.testing.assert_close(found[-1], wanted[-1], rtol=1e3 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_reductions_have_torchs_special_cases(dtype: torch.dtype) -> None:
    programs = [*every_reduction()[:-1], program(("x", "norm", ("grad",)), ("y", "div", (1.0, "x")), outputs=("y",))]
    numbers = [0.0, -0.0, 1.0, math.inf, 1.0, -math.inf, math.inf, math.nan, 1e38, 3e38, 1e200]
    sizes = [1, 1, 2, 3, 1, 2, 1]  # the last is infinite in float32
    row = torch.tensor(numbers, dtype=dtype)
    tensors = [[row] * len(p.tensors) for p in programs]
    found, wanted = after(PopulationStep, programs, tensors, CPU, sizes), expected(programs, tensors, sizes)
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_a_run_that_is_not_finite_touches_no_other() -> None:
    programs = every_reduction()
    tensors = [[t[0] for t in positive(p, SINGLE, sizes=(sum(SIZES),))] for p in programs]
    spoiled = [[torch.full_like(t, math.nan) for t in row] for row in tensors]
    mixed = [row for pair in zip(tensors, spoiled, strict=True) for row in pair]
    found = after(PopulationStep, [p for p in programs for _ in range(2)], mixed, CPU, SIZES)
    torch.testing.assert_close(found[::2], after(PopulationStep, programs, tensors, CPU, SIZES), rtol=0, atol=0)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    programs = [*every_reduction(), *every_statement()]
    tensors = [
        [t[0].to(SINGLE) for t in small_integers(p, sizes=(sum(SIZES),), seed=k)] for k, p in enumerate(programs)
    ]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(after(PopulationStep, programs, tensors, CPU, SIZES))
    torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_tensors_with_gaps_and_of_other_dtypes_step_too() -> None:
    population, runs = encode([program(("x", "mul", ("param", "grad")), outputs=("x", "param"))]), torch.tensor([0, 0])
    for dtype, gap in ((SINGLE, 2), (torch.bfloat16, 1)):
        params = torch.full((2, 3 * gap), 2.0, dtype=dtype)[:, ::gap]
        grads, slots = torch.full((2, 3), 3.0, dtype=dtype), torch.ones(1, 2, 3, dtype=dtype)
        PopulationStep(population, runs)(params, grads, slots, torch.empty(2, 0, dtype=dtype))
        assert (params == 6).all() and (slots == 2).all()


# -- the encoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"whole_language"}))
def test_real_rules_need_two_registers_beside_their_inputs_at_most(name: str) -> None:
    found = encode([RULES[name].program]).kernel
    assert found.registers <= found.inputs + 2


def test_a_long_chain_needs_no_register_of_its_own_for_each_link() -> None:
    links = [(f"v{k + 1}", "mul", (f"v{k}", "grad")) for k in range(50)]
    found = encode([program(("v0", "add", ("param", "grad")), *links, outputs=("v50",))]).kernel
    assert (found.registers, int(found.lengths)) == (2, 51)


def test_reductions_that_need_not_wait_for_each_other_stand_together() -> None:
    interleaved = program(
        ("a", "norm", ("param",)), ("b", "mul", ("a", "grad")), ("c", "mul", ("grad", "grad")), ("d", "mean", ("c",)),
        ("e", "add", ("b", "d")), ("f", "global_sum", ("e",)), outputs=("f",),
    )  # fmt: skip
    found = encode([interleaved]).kernel
    names = [OPERATIONS[k] for k in found.instructions[0, :, 0]]
    assert names == ["mul", "norm", "mean", "mul", "add", "global_sum"]


def test_what_no_output_depends_on_is_left_out() -> None:
    dead = program(("x", "mul", ("param", "c1")), ("y", "exp", ("grad",)), outputs=("x",))
    found = encode([dead])
    assert int(found.kernel.lengths) == 1 and found.scalars == ("c1",)


def test_outputs_may_be_inputs_numbers_and_coefficients() -> None:
    swapped = program(outputs=("first", "second", "param"))
    given_numbers = program(("s", "mul", ("c1", 3.0)), outputs=("s", -0.0, "c2"))
    before = [[torch.full((3,), float(k)) for k in range(4)]] * 2
    found = after(PopulationStep, [swapped, given_numbers], before, CPU)
    assert [t[0].item() for t in found[0]] == [2.0, 3.0, 0.0]
    assert [t[0].item() for t in found[1]] == [1.5, 0.0, -2.0]
    assert found[1][1].signbit().all()


def test_zeros_of_both_signs_are_two_numbers() -> None:
    signs = program(("a", "div", (1.0, 0.0)), ("b", "mul", ("grad", -0.0)), ("c", "add", ("a", "b")), outputs=("c",))
    zeros = program(("a", "mul", ("grad", 0.0)), ("b", "mul", ("grad", -0.0)), outputs=("a", "b"))
    ones = [torch.ones(2), torch.ones(2)]
    found = after(PopulationStep, [zeros, signs], [[*ones, torch.ones(2)], ones], CPU)
    assert not found[0][0].signbit().any() and found[0][1].signbit().all()
    assert (found[1][0] == torch.inf).all()


def test_scalars_differ_by_run_and_step() -> None:
    scaled = program(("x", "mul", ("param", "c1")), ("y", "add", ("x", "c2")), outputs=("y",))
    population, runs = encode([scaled]), torch.zeros(3, dtype=torch.int64)
    c1, c2 = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0, 20.0]])
    numbers = population.numbers(runs, {"c1": c1, "c2": c2})
    params, step = torch.ones(3, 4), PopulationStep(population, runs)
    for now in numbers:
        step(params, torch.zeros(3, 4), torch.empty(0, 3, 4), now)
    assert params.tolist() == [[31.0] * 4, [44.0] * 4, [59.0] * 4]


def test_nothing_to_step_is_no_error() -> None:
    population = encode([program(("x", "mul", ("param", "c1")), outputs=("x",))])
    for count, size in ((0, 3), (2, 0)):
        runs = torch.zeros(count, dtype=torch.int64)
        (numbers,) = population.numbers(runs, {"c1": 2.0})
        PopulationStep(population, runs)(
            torch.ones(count, size), torch.ones(count, size), torch.ones(0, count, size), numbers
        )


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs", [torch.tensor([0, 1]), torch.tensor([-1]), torch.tensor([0], dtype=torch.int32), torch.tensor([[0]])]
)
def test_runs_of_unknown_programs_are_refused(runs: Tensor) -> None:
    population = encode([program(outputs=("grad",))])
    with pytest.raises(ValueError, match=re.escape("programs in [0, 1)")):
        PopulationStep(population, runs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grads", torch.ones(1, 3)),
        ("grads", torch.ones(2, 3, dtype=DOUBLE)),
        ("params", torch.ones(3)),
        ("slots", torch.ones(0, 2, 3)),
        ("numbers", torch.ones(2, 1)),
    ],
)
def test_tensors_of_other_shapes_or_dtypes_are_refused(name: str, value: Tensor) -> None:
    population = encode([program(outputs=("grad", "param"))])
    tensors = {
        "params": torch.ones(2, 3),
        "grads": torch.ones(2, 3),
        "slots": torch.ones(1, 2, 3),
        "numbers": torch.ones(2, 0),
    }
    with pytest.raises(ValueError, match=f"{name} must be"):
        PopulationStep(population, torch.tensor([0, 0]))(**{**tensors, name: value})


@pytest.mark.parametrize("sizes", [[2], [], [4, -1]])
def test_sizes_of_other_rows_are_refused(sizes: list[int]) -> None:
    step = PopulationStep(encode([program(outputs=("grad",))]), torch.tensor([0]), sizes)
    with pytest.raises(ValueError, match="with 3 elements together"):
        step(torch.ones(1, 3), torch.ones(1, 3), torch.ones(0, 1, 3), torch.ones(1, 0))


def test_scalars_that_are_missing_or_of_unclear_shape_are_refused() -> None:
    population = encode([program(("x", "mul", ("param", "c1")), outputs=("x",))])
    runs = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="lack 'c1'"):
        population.numbers(runs, {})
    with pytest.raises(ValueError, match=re.escape("[runs, steps]")):
        population.numbers(runs, {"c1": torch.ones(2)})


def test_a_population_has_programs() -> None:
    with pytest.raises(ValueError, match="at least one program"):
        encode([])
    with pytest.raises(
        TypeError, match=r"encode takes programs, got RMSprop\(.*; of an elementwise rule that is rule\.program"
    ):
        encode([RULES["rmsprop"]])  # type: ignore[list-item]


# -- docs/kernels.md ---------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_makes_the_steps_of_each_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    (text,) = (block for block in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M) if "encode" in block)
    written: dict[str, Any] = {}
    exec(text, written)
    for rule, found in zip(written["rules"], written["params"], strict=True):
        p = torch.nn.Parameter(torch.zeros(1000))
        optimizer = metaopt.optimizer(rule, [p], execution="loop")
        for _ in range(50):
            p.grad = p.detach() - 1
            optimizer.step()
        torch.testing.assert_close(found, p.detach(), rtol=1e-5, atol=1e-6)
