"""The generated Triton step computes what `evaluate` computes, element by element, wherever the elements are.

Sums, products and quotients are rounded once each, unfused and in the program's order, in both: rules that have no other
functions agree bit for bit. Torch's other functions, its square root on CPUs among them, may be an ulp off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from random_programs import (
    coefficients,
    every_form,
    exact_programs,
    expected,
    positive,
    small_integers,
    smooth_programs,
    special,
)
from rule_strategies import ELEMENTWISE, RULES, Bowl
from torch import Tensor

from metaopt.kernels import Dtypes
from metaopt.program import REDUCTIONS, Program, Statement, evaluate, trace
from metaopt.rule import flat_hp
from metaopt.unroll import start, unroll
from metaopt_kernels.elementwise import BLOCK, TritonStep, elementwise
from metaopt_kernels.source import load_module
from metaopt_kernels.triton_kernels import TritonKernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter: 1 / 0 and the like
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]

SINGLE, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES: list[Dtypes] = [
    (SINGLE, SINGLE, SINGLE),
    (DOUBLE, DOUBLE, DOUBLE),
    (BRAIN, BRAIN, SINGLE),
    (BRAIN, BRAIN, BRAIN),
    (HALF, SINGLE, SINGLE),
    (SINGLE, BRAIN, BRAIN),
]
INEXACT = {"sqrt", "pow", "exp", "log", "tanh", "sin", "cos", "atan", *REDUCTIONS}
SHAPES = [(), (0,), (1,), (5, 3), (BLOCK + 6,), (2, 1, 3, 2, 2), (0,)]


def built(program: Program, dtypes: Dtypes, **options: Any) -> TritonStep:
    step = elementwise(program, dtypes, **options)
    assert step is not None
    return step


def moved(columns: Sequence[Sequence[Tensor]], device: torch.device) -> list[list[Tensor]]:
    return [[tensor.to(device, copy=True) for tensor in column] for column in columns]


def drawn(program: Program, dtypes: Dtypes, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    """Parameters and gradients of both signs; slots in [0, 1), for some are under a root."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randn, torch.randn, *[torch.rand] * (len(program.tensors) - 2)]
    return [
        [kind(shape, generator=generator).to(dtypes[min(k, 2)]) for shape in shapes] for k, kind in enumerate(kinds)
    ]


def after(program: Program, columns: Sequence[Sequence[Tensor]], scalars: dict[str, Any]) -> list[list[Tensor]]:
    """New parameters and slots by `evaluate` in float32, or float64 if parameters are, rounded to what stores them."""
    wide = DOUBLE if columns[0][0].dtype == DOUBLE else SINGLE
    rows = []
    for tensors in zip(*columns, strict=True):
        outputs = evaluate(program, {n: t.to(wide) for n, t in zip(program.tensors, tensors, strict=True)}, scalars)
        stored = (tensors[0], *tensors[2:])
        rows.append([new.to(old.dtype) for new, old in zip(outputs, stored, strict=True)])
    return [list(column) for column in zip(*rows, strict=True)]


def written(columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Parameters and slots, on the CPU."""
    return [[tensor.cpu() for tensor in column] for k, column in enumerate(columns) if k != 1]


def assert_agree(program: Program, got: list[list[Tensor]], want: list[list[Tensor]]) -> None:
    if not {s.op for s in program.kernel} & INEXACT:
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        return
    eps = torch.finfo(DOUBLE if want[0][0].dtype == DOUBLE else SINGLE).eps
    for mine, theirs in zip(got, want, strict=True):  # moves are of the order of 1; storage may round to a neighbour
        torch.testing.assert_close(mine, theirs, rtol=4 * torch.finfo(theirs[0].dtype).eps, atol=4 * eps)


def momentum(decay: str = "c1") -> Program:
    statements = (
        Statement("m", "mul", ("buf", decay)),
        Statement("new", "add", ("m", "grad")),
        Statement("u", "mul", ("new", 0.1)),
        Statement("p", "sub", ("param", "u")),
    )
    return Program(("c1", "c3"), ("param", "grad", "buf"), statements, ("p", "new"))


MOVE = Program((), ("param", "grad"), (), ("grad",))
"""The parameter becomes the gradient."""

# -- agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes))
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_launch_steps_parameters_of_every_shape_as_the_rule_says(
    name: str, dtypes: Dtypes, device: torch.device
) -> None:
    program = trace(ELEMENTWISE[name])
    scalars = {**flat_hp(ELEMENTWISE[name].hp), "t": 3}
    columns = drawn(program, dtypes)
    stepped = moved(columns, device)
    step = built(program, dtypes)
    assert step.fits(stepped)
    step(stepped, program.scalar_values(scalars))
    want = after(program, columns, scalars)
    assert_agree(program, written(stepped), want)
    torch.testing.assert_close([g.cpu() for g in stepped[1]], columns[1], rtol=0, atol=0)


def norms_of_norms() -> Program:
    """A mean and a norm that need not wait for each other, and a norm that waits for both."""
    statements = (
        Statement("size", "norm", ("grad",)),
        Statement("center", "mean", ("buf",)),
        Statement("above", "gt", ("buf", "center")),
        Statement("direction", "div", ("grad", "size")),
        Statement("chosen", "where", ("above", "direction", "c1")),
        Statement("length", "norm", ("chosen",)),
        Statement("share", "mean", ("above",)),
        Statement("scaled", "div", ("chosen", "length")),
        Statement("p", "sub", ("param", "scaled")),
    )
    return Program(("c1",), ("param", "grad", "buf", "s"), statements, ("p", "length", "share"))


REDUCING: dict[str, tuple[Program, dict[str, float]]] = {
    "lamb": (trace(RULES["lamb"]), {**flat_hp(RULES["lamb"].hp), "weight_decay": 0.1, "t": 3}),
    "norms_of_norms": (norms_of_norms(), {"c1": 0.5}),
}


@pytest.mark.parametrize(
    "dtypes", [(SINGLE, SINGLE, SINGLE), (DOUBLE, DOUBLE, DOUBLE), (BRAIN, BRAIN, SINGLE)], ids=["32", "64", "16"]
)
@pytest.mark.parametrize("name", REDUCING)
def test_rules_that_reduce_tensors_step_in_launches(name: str, dtypes: Dtypes, device: torch.device) -> None:
    program, scalars = REDUCING[name]
    columns = drawn(program, dtypes)
    stepped = moved(columns, device)
    step = built(program, dtypes)
    assert len(step.reducing) == {"lamb": 1, "norms_of_norms": 2}[name]
    step(stepped, program.scalar_values(scalars))
    found, want = written(stepped), after(program, columns, scalars)
    assert_agree(program, found, want)
    again = moved(columns, device)
    step(again, program.scalar_values(scalars))
    torch.testing.assert_close(written(again), found, rtol=0, atol=0, equal_nan=True)


def test_copies_are_tensors_of_their_own_to_reductions(device: torch.device) -> None:
    program = norms_of_norms()
    dtypes: Dtypes = (SINGLE, SINGLE, SINGLE)
    columns = drawn(program, dtypes, [(3, BLOCK + 9), (3, 5), (3,)])
    got = built(program, dtypes).copies(moved(columns, device), {"c1": torch.tensor([0.5, 1.0, 2.0]).double()})
    for k, c1 in enumerate((0.5, 1.0, 2.0)):
        own = [[tensor[k] for tensor in column] for column in columns]
        assert_agree(program, [[t[k].cpu() for t in column] for column in got], after(program, own, {"c1": c1}))


def test_an_unroll_takes_the_step_of_a_rule_that_reduces_tensors(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("the task's data is on the CPU")
    rule = RULES["lamb"]
    carry = start(Bowl(), rule, [1, 2])
    with torch.no_grad():
        wanted = unroll(Bowl(), rule, carry, 3, backend="eager")
        made = []

        class Counted(TritonKernels):
            def elementwise(self, *arguments: Any, **options: Any) -> TritonStep | None:
                made.append(super().elementwise(*arguments, **options))
                return made[-1]

        monkeypatch.setattr(sys.modules["metaopt.unroll"], "kernels_of", lambda kind: Counted())
        found = unroll(Bowl(), rule, carry, 3, backend="fused")
    assert made and None not in made
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1].tree(), wanted[1].tree())


def test_reductions_of_trees_are_left_to_torch() -> None:
    program = Program((), ("param", "grad"), (Statement("r", "global_norm", ("grad",)),), ("r",))
    assert elementwise(program, (SINGLE, SINGLE, SINGLE)) is None


@pytest.mark.parametrize("name", ["adamw", "lion", "nesterov"])
def test_copies_step_with_their_own_coefficients_wherever_their_rows_begin(name: str, device: torch.device) -> None:
    program = trace(ELEMENTWISE[name])
    hp = flat_hp(ELEMENTWISE[name].hp)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    # rows of 1030 float32 begin at multiples of 16 bytes in every second copy only
    columns = drawn(program, (SINGLE, SINGLE, SINGLE), [(3,), (3, 1030), (3, 4, 5), (3, 0), (3, 1)])
    before = moved(columns, device)
    values = program.scalar_values({**hp, "lr": rates.to(device), "t": torch.tensor([1.0, 2.0, 3.0]).to(device)})
    got = built(program, (SINGLE, SINGLE, SINGLE)).copies(before, values)
    for k, rate in enumerate(rates.tolist()):
        want = after(program, [[t[k] for t in column] for column in columns], {**hp, "lr": rate, "t": k + 1})
        assert_agree(program, [[t[k].cpu() for t in column] for column in got], want)
    torch.testing.assert_close(moved(before, torch.device("cpu")), columns, rtol=0, atol=0)


def test_copies_of_a_program_without_coefficients(device: torch.device) -> None:
    grad = torch.arange(6.0, device=device).reshape(2, 3)
    ((param,),) = built(MOVE, (SINGLE, SINGLE, SINGLE)).copies([[torch.zeros_like(grad)], [grad]], {})
    assert torch.equal(param, grad)


def test_copies_share_coefficients_that_are_numbers(device: torch.device) -> None:
    columns = drawn(momentum(), (SINGLE, SINGLE, SINGLE), [(2, 9)])
    got = built(momentum(), (SINGLE, SINGLE, SINGLE)).copies(moved(columns, device), {"c1": 0.5})
    torch.testing.assert_close(written([got[0], [], got[1]]), after(momentum(), columns, {"c1": 0.5, "c3": 0.0}))


@settings(max_examples=8)
@given(program=exact_programs())
def test_exact_arithmetic_agrees_bit_for_bit(program: Program, device: torch.device) -> None:
    columns = small_integers(program)
    stepped = moved(columns, device)
    built(program, (DOUBLE, DOUBLE, DOUBLE))(stepped, coefficients(program))
    torch.testing.assert_close(moved(stepped, torch.device("cpu")), expected(program, columns), rtol=0, atol=0)


@settings(max_examples=3)
@given(program=smooth_programs())
def test_real_arithmetic_agrees_to_rounding(program: Program, device: torch.device) -> None:
    # at most 9 operations; float64 powers by logarithms lose as many ulp as their logarithm is large
    for dtype, rtol in ((DOUBLE, 1e-12), (SINGLE, 1e-5)):
        columns = positive(program, dtype)
        stepped = moved(columns, device)
        built(program, (dtype, dtype, dtype))(stepped, coefficients(program))
        torch.testing.assert_close(moved(stepped, torch.device("cpu")), expected(program, columns), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_nan_and_infinity_pass_through_every_operation_as_in_torch(dtype: torch.dtype, device: torch.device) -> None:
    program = every_form()
    columns = special(program, dtype)
    stepped = moved(columns, device)
    built(program, (dtype, dtype, dtype))(stepped, coefficients(program))
    rtol = 4 * torch.finfo(dtype).eps
    for s, got, want in zip(program.statements, stepped[2:], expected(program, columns)[2:], strict=True):
        torch.testing.assert_close(
            got[0].cpu(), want[0], rtol=rtol, atol=0, equal_nan=True, msg=lambda m, s=s: f"{s}: {m}"
        )


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_functions_that_triton_lacks_are_right_far_from_1(dtype: torch.dtype, device: torch.device) -> None:
    statements = (
        Statement("a", "tanh", ("param",)),
        Statement("b", "pow", ("grad", "param")),
        Statement("c", "pow", ("param", 3.0)),
        Statement("d", "log", ("grad",)),
        Statement("e", "atan", ("param",)),
        Statement("f", "sin", ("param",)),
        Statement("g", "cos", ("grad",)),
    )
    slots = ("u", "v", "w", "x", "y", "z")
    program = Program((), ("param", "grad", *slots), statements, ("a", "b", "c", "d", "e", "f", "g"))
    small = torch.logspace(-12, 1, 50, dtype=dtype)
    columns = [[torch.cat([small, -small])], [torch.linspace(0.01, 20, 100, dtype=dtype)]]
    columns += [[torch.zeros(100, dtype=dtype)] for _ in slots]
    stepped = moved(columns, device)
    built(program, (dtype, dtype, dtype))(stepped, {})
    rtol = 1e-6 if dtype == SINGLE else 1e-12
    torch.testing.assert_close(written(stepped), after(program, columns, {}), rtol=rtol, atol=0)


def test_slots_are_swapped_and_set_at_once(device: torch.device) -> None:
    program = Program(("c1",), ("param", "grad", "a", "b", "c", "d"), (), ("grad", "b", "a", "c1", 7.0))
    columns = small_integers(program)
    stepped = moved(columns, device)
    built(program, (DOUBLE, DOUBLE, DOUBLE))(stepped, coefficients(program))
    torch.testing.assert_close(moved(stepped, torch.device("cpu")), expected(program, columns), rtol=0, atol=0)


# -- memory ------------------------------------------------------------------------------------------------------------


def strided(*strides: tuple[int, int]) -> list[list[Tensor]]:
    return [[torch.zeros(64).as_strided((4, 3), s)] for s in strides]


@pytest.mark.parametrize(
    ("columns", "fits"),
    [
        (strided((3, 1), (3, 1), (3, 1)), True),
        (strided((1, 4), (1, 4), (1, 4)), True),
        (strided((3, 1), (1, 4), (3, 1)), False),
        (strided((6, 2), (6, 2), (6, 2)), False),
        ([[torch.zeros(3)], [torch.zeros(3)], [torch.zeros(2)]], False),
        ([[torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3).double()]], False),
    ],
    ids=["contiguous", "transposed", "mixed", "gaps", "short", "dtype"],
)
def test_only_tensors_that_are_flat_memory_of_one_layout_fit(
    columns: list[list[Tensor]], fits: bool, device: torch.device
) -> None:
    there = [[tensor.to(device) for tensor in column] for column in columns]
    assert built(momentum(), (SINGLE, SINGLE, SINGLE)).fits(there) is fits
    elsewhere = [there[0], there[1], [torch.empty_like(there[2][0], device="meta")]]
    assert not built(momentum(), (SINGLE, SINGLE, SINGLE)).fits(elsewhere)


def test_a_slice_is_stepped_and_its_neighbours_are_not(device: torch.device) -> None:
    """Addresses that are no multiples of 16 bytes, in a block that would otherwise be whole."""
    memory = torch.zeros(3, BLOCK + 9, device=device)
    columns = [[row[1 : BLOCK + 4]] for row in memory]
    columns[1][0].fill_(1.0)
    built(momentum(), (SINGLE, SINGLE, SINGLE))(columns, {"c1": 0.5})
    assert torch.equal(columns[2][0].cpu(), torch.ones(BLOCK + 3))
    assert torch.count_nonzero(memory) == 3 * (BLOCK + 3)


def test_tensors_may_move_between_steps(device: torch.device) -> None:
    step = built(momentum(), (SINGLE, SINGLE, SINGLE))
    for _ in range(3):
        columns = [[torch.zeros(5, device=device)], [torch.ones(5, device=device)], [torch.zeros(5, device=device)]]
        step(columns, {"c1": 0.5})
        assert torch.equal(columns[2][0].cpu(), torch.ones(5))


def test_elements_beyond_32_bits_are_found(device: torch.device) -> None:
    """A parameter of 2^31 elements and one block more, of which only that block exists."""
    program = Program((), ("param", "grad"), (Statement("p", "add", ("param", "grad")),), ("p",))
    step = built(program, (SINGLE, SINGLE, SINGLE))
    param, grad = torch.zeros(BLOCK, device=device), torch.ones(BLOCK, device=device)
    far = 2**31
    begins = [tensor.data_ptr() - 4 * far for tensor in (param, grad, param)]
    table = torch.tensor([-(far // BLOCK), far + BLOCK, *begins], device=device)
    none = torch.zeros(0, dtype=DOUBLE, device=device)
    step.kernel[(1,)](table, none, 0, 1, 1, 1, COUNT=1, BLOCK=BLOCK)
    assert torch.equal(param.cpu(), torch.ones(BLOCK))


def test_autograd_notices_that_a_parameter_changed(device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (param * param).sum()
    zeros = torch.zeros(3, device=device)
    built(momentum(), (SINGLE, SINGLE, SINGLE))([[param], [torch.ones_like(zeros)], [zeros]], {"c1": 0.5})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_every_float32_is_rounded_to_the_nearest_bfloat16_ties_to_even(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32)
    ties = (torch.arange(500, dtype=torch.int32) << 16) + 0x3F808000
    grad = torch.cat([bits, ties]).view(SINGLE)  # NaN, infinite, subnormal, half-way
    param = torch.zeros(len(grad), dtype=BRAIN, device=device)
    built(MOVE, (BRAIN, SINGLE, SINGLE))([[param], [grad.to(device)]], {})
    torch.testing.assert_close(param.cpu(), grad.bfloat16(), rtol=0, atol=0, equal_nan=True)


def rounded_at_random(values: Tensor, seed: int, device: torch.device) -> Tensor:
    param = torch.zeros(len(values), dtype=BRAIN, device=device)
    step = built(MOVE, (BRAIN, SINGLE, SINGLE), stochastic_rounding=True)
    step([[param], [values.to(device)]], {}, seed=seed)
    return param.cpu().float()


def test_stochastic_rounding_is_right_on_average(device: torch.device) -> None:
    """Else parameters would drift, or stand still where moves are smaller than half a step of bfloat16."""
    fractions = torch.arange(16) / 16
    each = 512
    for scale in (1.0, -1.0, 2.0**-20):
        got = rounded_at_random(scale * (1 + 2**-7 * fractions).repeat(each), 3, device)
        up = (got / scale - 1) * 2**7
        assert set(up.unique().tolist()) == {0.0, 1.0}  # one of the two neighbours
        bound = 5 * (fractions * (1 - fractions) / each).sqrt()  # 5 standard deviations; what fits is exact
        assert ((up.view(each, 16).mean(0) - fractions).abs() <= bound).all()


def test_stochastic_rounding_keeps_what_has_no_neighbours(device: torch.device) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.5])
    torch.testing.assert_close(rounded_at_random(values, 0, device), values, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_follows_the_seed_and_repeats_no_bits(device: torch.device) -> None:
    halves = torch.full((2, 2 * BLOCK), 1 + 2**-8)
    one, again, other = (rounded_at_random(halves[0], seed, device) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    step = built(MOVE, (BRAIN, SINGLE, SINGLE), stochastic_rounding=True)
    ((copies,),) = step.copies(
        [[torch.zeros(2, 2 * BLOCK, dtype=BRAIN, device=device)], [halves.to(device)]], {}, seed=1
    )
    first, second = copies.cpu().float()
    for a, b in ((one, other), (one[:BLOCK], one[BLOCK:]), (first, second)):
        # independent fair coins agree in half of n places; 5 standard deviations are 2.5 / sqrt(n)
        assert abs((a == b).double().mean().item() - 0.5) <= 2.5 / len(a) ** 0.5


# -- at the door -------------------------------------------------------------------------------------------------------


def test_a_dtype_that_is_not_stored_gives_no_step() -> None:
    assert elementwise(momentum(), (torch.float8_e4m3fn, SINGLE, SINGLE)) is None


def test_stochastic_rounding_of_what_bfloat16_does_not_store_is_refused() -> None:
    with pytest.raises(ValueError, match="is for bfloat16 parameters, got"):
        elementwise(momentum(), (SINGLE, SINGLE, SINGLE), stochastic_rounding=True)


def test_stochastic_rounding_asks_for_a_seed() -> None:
    step = built(MOVE, (BRAIN, SINGLE, SINGLE), stochastic_rounding=True)
    with pytest.raises(ValueError, match="needs a seed, got None"):
        step([[torch.zeros(3, dtype=BRAIN)], [torch.ones(3)]], {})


def test_a_module_is_written_once_and_again_if_its_file_is_not_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "first"))
    module = load_module("answer = 42\n", "question")
    (path,) = (tmp_path / "first").glob("question-*.py")
    assert module.answer == 42 and load_module("answer = 42\n", "question") is module
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "second"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / path.name).write_text("answer = 4")
    assert load_module("answer = 42\n", "question").answer == 42
    assert not [name for name in sys.modules if "question" in name]
