"""The C++ step computes what `evaluate` computes; where it cannot be had, there is None and at most one warning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from random_programs import (
    coefficients,
    copied,
    every_form,
    exact_programs,
    expected,
    positive,
    small_integers,
    smooth_programs,
    special,
)
from torch import Tensor

from metaopt.program import CppStep, Program, Statement, build, compile_cpp, compiler
from metaopt.program.cpp import cpp_source

FLOAT = (torch.float32, torch.float32, torch.float32)
DOUBLE = (torch.float64, torch.float64, torch.float64)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this run's own: nothing is left in the home directory, nothing stale is found there."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cpp")
        patch.setenv("METAOPT_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture
def not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_warned", False)


def built(program: Program, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> CppStep:
    step = compile_cpp(program, *dtypes)
    assert step is not None
    return step


def momentum(decay: str = "c1") -> Program:
    statements = (
        Statement("m", "mul", ("buf", decay)),
        Statement("new", "add", ("m", "grad")),
        Statement("u", "mul", ("new", 0.1)),
        Statement("p", "sub", ("param", "u")),
    )
    return Program(("c1", "c3"), ("param", "grad", "buf"), statements, ("p", "new"))


# -- agreement ---


@needs_compiler
@settings(max_examples=20)
@given(program=exact_programs())
def test_exact_arithmetic_agrees_bit_for_bit_and_gradients_are_untouched(program: Program) -> None:
    columns = small_integers(program)
    after = copied(columns)
    built(program, DOUBLE)(after, coefficients(program))
    torch.testing.assert_close(after, expected(program, columns), rtol=0, atol=0)


@needs_compiler
@settings(max_examples=10)
@given(program=smooth_programs())
def test_real_arithmetic_agrees_to_rounding(program: Program) -> None:
    # at most 9 operations of a few ulp each; C++ fuses a * b + c, torch does not
    for dtypes, rtol in ((DOUBLE, 1e-13), (FLOAT, 1e-4)):
        columns = positive(program, dtypes[0])
        after = copied(columns)
        built(program, dtypes)(after, coefficients(program))
        torch.testing.assert_close(after, expected(program, columns), rtol=rtol, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtypes", [FLOAT, DOUBLE], ids=["float", "double"])
def test_nan_and_infinity_pass_through_every_operation_as_in_torch(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> None:
    program = every_form()
    columns = special(program, dtypes[0])
    after = copied(columns)
    built(program, dtypes)(after, coefficients(program))
    for s, got, want in zip(program.statements, after[2:], expected(program, columns)[2:], strict=True):
        torch.testing.assert_close(got[0], want[0], equal_nan=True, msg=lambda m, s=s: f"{s}: {m}")


@needs_compiler
def test_slots_are_swapped_and_set_at_once() -> None:
    program = Program(("c1",), ("param", "grad", "a", "b", "c"), (), ("grad", "b", "a", "c1"))
    columns = small_integers(program)
    after = copied(columns)
    built(program, DOUBLE)(after, coefficients(program))
    torch.testing.assert_close(after, expected(program, columns), rtol=0, atol=0)


# -- tensors and threads ---


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_element_is_updated_once_however_the_work_is_shared(threads: int) -> None:
    program = momentum()
    columns = small_integers(program, sizes=(3, 0, 40_001, 17, 1, 25_000, 5))
    after = copied(columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        built(program, DOUBLE)(after, coefficients(program))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(after, expected(program, columns), rtol=1e-15, atol=1e-15)


@needs_compiler
def test_bf16_parameters_are_computed_in_float32_and_rounded_once_to_nearest_even() -> None:
    program = Program((), ("param", "grad", "copy"), (), ("grad", "param"))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    ties = (torch.arange(1000, dtype=torch.int32) << 16) + 0x3F808000
    grad = torch.cat([bits, ties]).view(torch.float32)  # every kind of float: NaN, infinite, subnormal, half-way
    param, copy = torch.randn(len(grad), generator=generator).bfloat16(), torch.zeros(len(grad))
    widened = param.float()
    built(program, (torch.bfloat16, torch.float32, torch.float32))([[param], [grad], [copy]], {})
    torch.testing.assert_close(param, grad.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(copy, widened)


@needs_compiler
def test_float32_state_beside_bf16_parameters_keeps_what_bf16_would_lose() -> None:
    program = momentum()
    param, grad, buf = torch.ones(100).bfloat16(), torch.full((100,), 2**-10).bfloat16(), torch.ones(100)
    built(program, (torch.bfloat16, torch.bfloat16, torch.float32))([[param], [grad], [buf]], {"c1": 1.0})
    assert torch.equal(buf, torch.full((100,), 1 + 2**-10))
    assert torch.equal(param, (1 - 0.1 * buf).bfloat16())


@needs_compiler
def test_autograd_notices_that_a_parameter_changed() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    built(momentum(), FLOAT)([[param], [torch.ones(3)], [torch.zeros(3)]], {"c1": 0.5})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def strided(*strides: tuple[int, int]) -> list[list[Tensor]]:
    return [[torch.zeros(64).as_strided((4, 3), s)] for s in strides]


@needs_compiler
@pytest.mark.parametrize(
    ("columns", "fits"),
    [
        (strided((3, 1), (3, 1), (3, 1)), True),
        (strided((1, 4), (1, 4), (1, 4)), True),
        (strided((3, 1), (1, 4), (3, 1)), False),
        (strided((6, 2), (6, 2), (6, 2)), False),
        (strided((0, 1), (0, 1), (0, 1)), False),
        ([[torch.zeros(3)], [torch.zeros(3)], [torch.zeros(2)]], False),
        ([[torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3).double()]], False),
        ([[torch.zeros(3, device="meta")] for _ in range(3)], False),
    ],
    ids=["contiguous", "transposed", "mixed", "gaps", "expanded", "short", "dtype", "device"],
)
def test_only_tensors_that_are_flat_memory_of_one_layout_fit(columns: list[list[Tensor]], fits: bool) -> None:
    assert built(momentum(), FLOAT).fits(columns) is fits


@needs_compiler
def test_transposed_tensors_are_updated_in_their_own_memory() -> None:
    columns = strided((1, 4), (1, 4), (1, 4))
    columns[1][0].copy_(torch.arange(12).reshape(4, 3))
    built(momentum(), FLOAT)(columns, {"c1": 0.5})
    torch.testing.assert_close(columns[0][0], -0.1 * torch.arange(12).reshape(4, 3))


# -- building ---


def test_without_a_compiler_there_is_no_step_and_no_warning(monkeypatch: pytest.MonkeyPatch, not_warned: None) -> None:
    monkeypatch.setenv("METAOPT_CXX", "")
    assert compiler() is None
    assert compile_cpp(momentum(), *FLOAT) is None


@needs_compiler
def test_a_dtype_that_cpp_does_not_handle_gives_no_step_and_no_warning(not_warned: None) -> None:
    assert compile_cpp(momentum(), torch.float16, torch.float16, torch.float32) is None
    with pytest.raises(ValueError, match="'half' is no storage type"):
        cpp_source(momentum(), "half", "float", "float")


def test_a_compiler_that_fails_is_reported_once(monkeypatch: pytest.MonkeyPatch, not_warned: None) -> None:
    monkeypatch.setenv("METAOPT_CXX", "false")
    with pytest.warns(RuntimeWarning, match="falls back to torch operations") as caught:
        assert compile_cpp(momentum(), *FLOAT) is None
        assert compile_cpp(momentum("c3"), *FLOAT) is None
    assert len(caught) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, not_warned: None
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="METAOPT_CACHE_DIR to a writable directory"):
        assert compile_cpp(momentum(), *FLOAT) is None


@needs_compiler
def test_a_library_is_built_once_per_machine_and_rebuilt_if_it_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path))
    columns = [[torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]]
    built(momentum(), FLOAT)(columns, {"c1": 0.5})
    (library,) = tmp_path.iterdir()  # no temporary files stay behind
    moved = library.read_bytes()

    elsewhere = tmp_path / "elsewhere"  # another directory, or the loader would hand back the library it has
    elsewhere.mkdir()
    (elsewhere / library.name).write_bytes(moved)
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(elsewhere))
    with monkeypatch.context() as patch:
        patch.setattr(build, "_build", lambda *_: pytest.fail("the cached library was not used"))
        built(momentum(), FLOAT)

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / library.name).write_bytes(moved[:100])
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(broken))
    built(momentum(), FLOAT)(columns, {"c1": 0.5})
    assert (broken / library.name).stat().st_size > 100


def test_a_library_for_another_cpu_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    names = set()
    for flags in ("avx2", "avx2 avx512f"):
        directory = tmp_path / flags.replace(" ", "-")
        monkeypatch.setattr(build, "_cpu", lambda flags=flags: flags)
        monkeypatch.setenv("METAOPT_CACHE_DIR", str(directory))
        built(momentum(), FLOAT)
        names |= {path.name for path in directory.iterdir()}
    assert len(names) == 2
