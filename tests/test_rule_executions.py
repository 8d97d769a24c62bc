"""One rule, many executions: each computes what the rule says, for every rule that is registered.

Tolerances. For an `ElementwiseRule` the reference is its Program in float64, and each entry of each parameter and slot
may be off by what rounding can have done to that very entry up to then (`error_bounds`): about an ulp of its size plus
a few ulp of its moves. A sign or a comparison within rounding of its jump has a bound as large as the jump: this, not a
looser tolerance, is what exempts an entry of Lion whose interpolated momentum cancels. Other rules are compared with
their own `update`, tensor by tensor: 4 ulp of the largest entry plus a part of the largest move of 1e-5 (float32) or
1e-12 (float64), times `AMPLIFIED` for rules that amplify rounding.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from error_bounds import Bounded, bounded_step
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_strategies import (
    DTYPES,
    ELEMENTWISE,
    HORIZON,
    OTHERS,
    RULES,
    Problem,
    Stepper,
    copies,
    functional,
    make_problem,
    middle,
    problems,
    vmapped,
)

from metaopt.export import write_module
from metaopt.program import OPS, compile_cpp, compiler, python_source, trace
from metaopt.rule import ElementwiseRule, Params, State, flat_hp

AMPLIFIED = {
    # Newton-Schulz multiplies a small singular value, and so its rounding, by 3.4445 in each of 5 iterations
    "muon": 500.0,
}

by_dtype = pytest.mark.parametrize("dtype", DTYPES)


# -- what is compared --------------------------------------------------------------------------------------------------


def elementwise_of(problem: Problem) -> ElementwiseRule:
    assert isinstance(problem.rule, ElementwiseRule)
    return problem.rule


def reference(problem: Problem) -> dict[str, list[Bounded]]:
    """Parameter and slots after the last step, with bounds."""
    rule = elementwise_of(problem)
    found = {}
    for name, param in problem.params.items():
        values = [Bounded.exact(x) for x in (param, *(rule.init_slot(slot, param) for slot in rule.slots))]
        for t, grads in enumerate(problem.grads, 1):
            tensors = dict(zip(trace(rule).tensors, (values[0], Bounded.exact(grads[name]), *values[1:]), strict=True))
            values = bounded_step(trace(rule), tensors, {**flat_hp(rule.hp), "t": t}, problem.dtype)
        found[name] = values
    return found


def assert_within(problem: Problem, got: tuple[Params, State], want: dict[str, list[Bounded]], how: str) -> None:
    params, state = got
    for name, bounds in want.items():
        assert int(state[name]["step"]) == len(problem.grads)
        slots = elementwise_of(problem).slots
        assert set(state[name]) == {"step", *slots}
        for what, bound in zip(("param", *slots), bounds, strict=True):
            value = params[name] if what == "param" else state[name][what]
            assert value.shape == problem.params[name].shape and value.dtype == problem.dtype
            error = (value.to(torch.float64) - bound.value).abs()
            fine = (error <= bound.error) | (value == bound.value) | (value.isnan() & bound.value.isnan())
            fine |= ~bound.error.isfinite()
            assert fine.all(), (
                f"{what} of {name} by {how}: {value[~fine]} should be {bound.value[~fine]} to {bound.error[~fine]}; "
                f"{problem.rule}"
            )


def assert_close(name: str, problem: Problem, got: tuple[Params, State], want: tuple[Params, State]) -> None:
    of_move = {torch.float32: 1e-5, torch.float64: 1e-12}[problem.dtype] * AMPLIFIED.get(name, 1.0)
    ulp = torch.finfo(problem.dtype).eps
    for key, param in problem.params.items():
        assert got[1][key].keys() == want[1][key].keys()
        before = {"param": param, **problem.rule.init({key: param}, problem.info)[key]}
        pairs = {"param": (got[0][key], want[0][key])}
        pairs |= {slot: (torch.as_tensor(got[1][key][slot]), torch.as_tensor(v)) for slot, v in want[1][key].items()}
        for what, (mine, theirs) in pairs.items():
            assert mine.shape == theirs.shape and (what == "step" or mine.dtype == theirs.dtype), what
            if theirs.numel() == 0:
                continue
            bound = of_move * (theirs - before[what]).abs().max() + 4 * ulp * theirs.abs().max()
            fine = ((mine - theirs).abs() <= bound) | (mine == theirs) | (mine.isnan() & theirs.isnan())
            assert fine.all(), f"{what} of {key}: {mine[~fine]} should be {theirs[~fine]} to {bound}; {problem.rule}"


# -- executions --------------------------------------------------------------------------------------------------------


def as_written(problem: Problem) -> tuple[Params, State]:
    """The author's two methods on tensors, with nothing of ours between."""
    rule = elementwise_of(problem)
    return _by_functions(problem, lambda hp, t: rule.coefficients(hp, t), rule.elementwise)


def printed(problem: Problem) -> tuple[Params, State]:
    """The source that tells a reader what the rule does."""
    namespace: dict[str, Any] = {"torch": torch, "math": math}
    exec(python_source(trace(elementwise_of(problem))), namespace)
    return _by_functions(problem, lambda hp, t: namespace["coefficients"](**flat_hp(hp), t=t), namespace["update"])


def _by_functions(
    problem: Problem, coefficients: Callable[..., Any], update: Callable[..., Any]
) -> tuple[Params, State]:
    rule = elementwise_of(problem)
    params, state = dict(problem.params), rule.init(problem.params, problem.info)
    for name, t in itertools.product(params, range(1, len(problem.grads) + 1)):
        old = [state[name][slot] for slot in rule.slots]
        params[name], *slots = update(params[name], problem.grads[t - 1][name], *old, **coefficients(rule.hp, t))
        state[name] = {"step": state[name]["step"] + 1, **dict(zip(rule.slots, slots, strict=True))}
    return params, state


@by_dtype
@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=25)
@given(data=st.data())
def test_every_execution_of_an_elementwise_rule_computes_its_program(name: str, dtype: str, data: Any) -> None:
    problem = data.draw(problems(ELEMENTWISE[name], DTYPES[dtype]))
    want = reference(problem)
    assert_within(problem, functional(problem, shared_step=False), want, "update, tensor by tensor")
    assert_within(problem, functional(problem, shared_step=True), want, "update, all tensors as one")
    assert_within(problem, as_written(problem), want, "the rule as it is written")
    assert_within(problem, printed(problem), want, "the printed source")
    for execution in ("plain", "loop", "foreach", "auto"):
        assert_within(problem, Stepper(problem, execution=execution).run(), want, execution)


@given(data=st.data(), name=st.sampled_from(sorted(OPS.keys() - {"where"})))
def test_scalar_arithmetic_is_the_same_on_floats_and_on_tensors(name: str, data: Any) -> None:
    """Else coefficients of an unroll and of an optimizer would differ, or one of them would raise."""
    corners = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0, 3.0, 0.999, 1e200, -1e200, 1e-200])
    args = [data.draw(corners) for _ in range(OPS[name].arity)]
    want = OPS[name].plain(*(torch.tensor(arg, dtype=torch.float64) for arg in args))
    got = torch.tensor(OPS[name].scalar(*args), dtype=torch.float64)
    torch.testing.assert_close(got, want.to(torch.float64), rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler: set CXX or install g++")
@by_dtype
@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=25)
@given(data=st.data())
def test_generated_cpp_computes_the_program(name: str, dtype: str, data: Any) -> None:
    problem = data.draw(problems(ELEMENTWISE[name], DTYPES[dtype]))
    assert compile_cpp(trace(elementwise_of(problem)), *[problem.dtype] * 3) is not None
    assert_within(problem, Stepper(problem, execution="fused").run(), reference(problem), "C++")


@by_dtype
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_bounds_are_narrow_enough_to_tell_rules_apart(name: str, dtype: str) -> None:
    """Guards the tests above: at ordinary values the bound is a few ulp, except where a sign or a root of 0 is near."""
    problem = make_problem(ELEMENTWISE[name], DTYPES[dtype], [(200,)], steps=6, seed=3, zeros=0.1)
    want, *_ = reference(problem)["w0"]
    moved = (want.value - problem.params["w0"]).abs()
    size = torch.maximum(problem.params["w0"].abs(), want.value.abs())
    # Adam's 1 - 0.999^t loses 3 digits in float64, in every execution
    narrow = want.error <= {"float32": 3e-5, "float64": 2e-12}[dtype] * (moved + size)
    assert narrow.double().mean() > 0.8


@by_dtype
@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=12)
@given(data=st.data())
def test_every_execution_of_another_rule_computes_its_update(name: str, dtype: str, data: Any) -> None:
    problem = data.draw(problems(OTHERS[name], DTYPES[dtype]))
    want = functional(problem, shared_step=False)
    assert_close(name, problem, functional(problem, shared_step=True), want)
    for execution in ("plain", "loop", "foreach", "fused", "auto"):
        assert_close(name, problem, Stepper(problem, execution=execution).run(), want)


@by_dtype
@pytest.mark.parametrize("name", RULES)
@settings(max_examples=12)
@given(data=st.data())
def test_vmapped_copies_with_their_own_hyperparameters_equal_a_loop_over_copies(
    name: str, dtype: str, data: Any
) -> None:
    several = data.draw(copies(RULES[name], DTYPES[dtype], 3))
    for problem, got in zip(several, vmapped(several), strict=True):
        if name in ELEMENTWISE:
            assert_within(problem, got, reference(problem), "vmap")
        else:
            assert_close(name, problem, got, functional(problem, shared_step=True))


# -- exported files ----------------------------------------------------------------------------------------------------


def load(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # the dataclasses in it want to find their module
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("name", RULES)
def test_exported_file_trains_alike_for_50_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[name]
    path = write_module(rule, "Exported", tmp_path / f"exported_{name}.py")
    exported = load(path, "Exported", monkeypatch)
    extra = {"horizon": HORIZON} if "horizon" in rule.requirements() else {}
    other = rule.replaced(**middle(rule))  # options are fixed in the file, hyperparameters are arguments
    problem = make_problem(other, torch.float32, [(7,), (4, 5), (3, 2, 2, 2), ()], steps=50, seed=5)
    got = Stepper(problem, lambda params: exported(params, **other.hp, **extra)).run()
    if name in ELEMENTWISE:
        assert_within(problem, got, reference(problem), "the exported file")
    else:
        assert_close(name, problem, got, functional(problem, shared_step=False))
