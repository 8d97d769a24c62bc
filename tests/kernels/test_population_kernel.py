"""The population machine in Triton computes what `evaluate_tree` computes for each program alone.

Bit for bit, where a program has none of the functions that torch and Triton compute otherwise.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from population_cases import RULES, after, every_reduction, every_statement, expected, trained
from random_programs import exact_programs, positive, reducing_programs, small_integers, smooth_programs, special

from metaopt import registry
from metaopt.cpp_kernels import CppKernels
from metaopt.program import OPS, Program, Statement
from metaopt.program.population import encode
from metaopt_kernels.population import BLOCK, TritonPopulationStep
from metaopt_kernels.triton_kernels import TritonKernels
from metaopt_symbolic.evaluate import train
from metaopt_symbolic.genome import SEEDS, parse

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter: 1 / 0 and the like
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]

SIZES = (BLOCK + 40, 1, 0, 20)
"""Of the tensors in a row: one needs two blocks, and one has no elements."""

SINGLE, DOUBLE = torch.float32, torch.float64


@settings(max_examples=5)
@given(programs=st.lists(exact_programs(), min_size=40, max_size=40))
def test_different_programs_step_in_one_launch(device: torch.device, programs: list[Program]) -> None:
    columns = [[*small_integers(p, sizes=(40,), seed=k), *special(p, SINGLE)] for k, p in enumerate(programs)]
    count = [len(p.tensors) for p in programs]
    before = [  # of each tensor, 40 integers and then the special numbers
        [torch.cat([c[k][0].to(SINGLE), c[n + k][0]]) for k in range(n)] for c, n in zip(columns, count, strict=True)
    ]
    found = after(TritonPopulationStep, programs, before, device)
    torch.testing.assert_close(found, expected(programs, before), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=2)
@given(programs=st.lists(smooth_programs(), min_size=20, max_size=20))
def test_real_arithmetic_agrees_to_rounding(device: torch.device, programs: list[Program]) -> None:
    before = [[column[0] for column in positive(p, SINGLE, sizes=(40,))] for p in programs]
    found = after(TritonPopulationStep, programs, before, device)
    torch.testing.assert_close(
        found, expected(programs, before), rtol=1e-4, atol=0
    )  # an ulp of pow or tanh, which grows


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_every_operation_has_torchs_special_cases(dtype: torch.dtype, device: torch.device) -> None:
    programs = every_statement()
    assert {s.op for p in programs for s in p.statements} == {*OPS}
    before = [[column[0] for column in special(p, dtype)] for p in programs]
    torch.testing.assert_close(
        after(TritonPopulationStep, programs, before, device), expected(programs, before),
        rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("size", [1, BLOCK + 3])
def test_rules_train_side_by_side_with_their_own_hyperparameters(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    runs = [(name, lr) for name, lr in zip(RULES, (0.1, 1e-3, 0.03, 0.01, 0.1, 1e-3, 0.01), strict=True)]
    found, wanted = trained(TritonPopulationStep, [*runs, ("lion", 0.02)], dtype, steps=3, size=size, device=device)
    eps = torch.finfo(dtype).eps  # roots and powers may be an ulp off, in each step
    torch.testing.assert_close(found, wanted, rtol=16 * eps, atol=16 * eps)


@settings(max_examples=2)
@given(programs=st.lists(reducing_programs(), min_size=6, max_size=6))
def test_reductions_over_tensors_and_trees_agree_to_rounding(device: torch.device, programs: list[Program]) -> None:
    before = [[column[0] for column in positive(p, SINGLE, sizes=(sum(SIZES),))] for p in programs]
    found = after(TritonPopulationStep, programs, before, device, SIZES)
    # at most 9 operations, of which some multiply errors
    torch.testing.assert_close(found, expected(programs, before, SIZES), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", [SIZES, None])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_reductions_of_both_signs_are_exact_in_sums_of_halves(
    dtype: torch.dtype, sizes: tuple[int, ...] | None, device: torch.device
) -> None:
    programs = every_reduction()
    integers = [small_integers(p, sizes=(sum(SIZES),), seed=k) for k, p in enumerate(programs)]
    before = [[column[0].to(dtype) / 2 for column in columns] for columns in integers]
    found, wanted = after(TritonPopulationStep, programs, before, device, sizes), expected(programs, before, sizes)
    torch.testing.assert_close(found[:-1], wanted[:-1], rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
    # the last one sums what has been rounded, of both signs
    torch.testing.assert_close(found[-1], wanted[-1], rtol=1e3 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_reductions_of_one_run_are_the_same_bits_beside_any_others(device: torch.device) -> None:
    programs = every_reduction()
    before = [[column[0] for column in positive(p, SINGLE, sizes=(sum(SIZES),))] for p in programs]
    alone = [after(TritonPopulationStep, [p], [row], device, SIZES)[0] for p, row in zip(programs, before, strict=True)]
    spoiled = [[torch.full_like(tensor, torch.nan) for tensor in row] for row in before]
    mixed = [row for pair in zip(spoiled, before, strict=True) for row in pair]
    found = after(TritonPopulationStep, [p for p in programs for _ in range(2)], mixed, device, SIZES)
    torch.testing.assert_close(found[1::2], alone, rtol=0, atol=0)


def test_sums_over_more_blocks_than_are_added_up_at_once(device: torch.device) -> None:
    """Of one element each, so that there are many."""
    sizes = [1] * 140
    tree = Program((), ("param", "grad"), (Statement("r", "global_sum", ("grad",)),), ("r",))
    before = [[torch.zeros(140), torch.arange(140.0)]]
    (found,) = after(TritonPopulationStep, [tree], before, device, sizes)
    assert (found[0] == 139 * 70).all()


def test_registers_beyond_the_common_eight_serve(device: torch.device) -> None:
    """Nine values are made before the first is used."""
    made = [Statement(f"v{k}", "mul", ("grad", float(k))) for k in range(9)]
    summed = [Statement(f"s{k + 1}", "sub", (f"v{k}", f"s{k}" if k else "param")) for k in range(9)]
    program = Program((), ("param", "grad"), (*made, *summed), ("s9",))
    assert encode([program]).kernel.registers > 8
    before = [[torch.arange(5.0), torch.ones(5)]]
    torch.testing.assert_close(
        after(TritonPopulationStep, [program], before, device), expected([program], before), rtol=0, atol=0
    )


def test_tensors_that_a_kernel_cannot_walk_are_refused(device: torch.device) -> None:
    population = encode([Program((), ("param", "grad"), (), ("grad",))])
    step = TritonPopulationStep(population, torch.zeros(2, dtype=torch.int64, device=device))
    rest = {"slots": torch.ones(0, 2, 3, device=device), "numbers": torch.ones(2, 0, device=device)}
    wide = torch.ones(2, 6, device=device)
    with pytest.raises(ValueError, match="params must be contiguous float32 or float64"):
        step(params=wide[:, ::2], grads=torch.ones(2, 3, device=device), **rest)
    half = {name: tensor.half() for name, tensor in rest.items()}
    with pytest.raises(ValueError, match=r"contiguous float32 or float64, got torch\.float16"):
        step(params=wide[:, :3].half().contiguous(), grads=torch.ones(2, 3, device=device).half(), **half)
    with pytest.raises(ValueError, match="runs must be on"):
        TritonPopulationStep(population, torch.zeros(2, dtype=torch.int64, device="meta"))


def test_searched_runs_step_by_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    task = registry.create("task", "digits_mlp", hidden=(4,), batch_size=8, device=str(device))
    programs = [parse(SEEDS[name]).program() for name in ("adamw", "lion", "momentum")]
    made = []
    for kernels in (CppKernels(), TritonKernels()):
        monkeypatch.setattr("metaopt_symbolic.evaluate.kernels_of", lambda _, kernels=kernels: kernels)
        made.append(train(task, encode(programs), horizon=3, seeds=(0, 1), multipliers=(1.0, 10.0)))
    assert (made[0].diverged == -1).all()
    torch.testing.assert_close(made[0].losses, made[1].losses, rtol=1e-4, atol=0)  # some ulps of float32 in each step
