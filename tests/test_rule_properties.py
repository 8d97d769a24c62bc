"""What every registered rule promises beyond its arithmetic (for which see `test_rule_executions`)."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_strategies import (
    BY_TENSOR,
    DTYPES,
    ELEMENTWISE,
    HORIZON,
    RULES,
    SHAPES,
    Bowl,
    Problem,
    Stepper,
    advance,
    copies,
    functional,
    make_problem,
    middle,
    problems,
    vmapped,
)
from torch import Tensor

from metaopt import tree
from metaopt.program import compiler
from metaopt.rule import Params, UpdateRule
from metaopt.torch_optimizer import RuleOptimizer
from metaopt.unroll import Carry, start, unroll

FILLED = tuple(shape for shape in SHAPES if math.prod(shape))
executions = st.sampled_from(["plain", "loop", "foreach", "auto", *(["fused"] if compiler() else [])])
dtypes = st.sampled_from(list(DTYPES.values()))


def assert_same(got: Any, want: Any) -> None:
    """Bit for bit, but for the sign of NaN."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, dict):
            assert_same(got[key], value)
        else:
            torch.testing.assert_close(
                got[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
            )


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=10)
@given(data=st.data(), dtype=dtypes, execution=executions)
def test_training_saved_and_loaded_midway_continues_bit_for_bit(
    name: str, dtype: torch.dtype, execution: Any, data: Any
) -> None:
    problem = data.draw(problems(RULES[name], dtype))
    cut = len(problem.grads) // 2
    whole, before = Stepper(problem, execution=execution), Stepper(problem, execution=execution)
    for given_ in problem.grads[:cut]:
        before.step(given_)
    file = io.BytesIO()
    torch.save(before.optimizer.state_dict(), file)
    file.seek(0)
    defaults = {key: value for key, value in RULES[name].values().items() if key in problem.rule.hp}
    elsewhere = replace(problem, params=before.result()[0], rule=problem.rule.replaced(**defaults))
    after = Stepper(elsewhere, execution=execution)  # its hyperparameters are those of the file, too
    after.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for given_ in problem.grads[cut:]:
        after.step(given_)
    want, got = whole.run(), after.result()
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=5)
@given(data=st.data(), dtype=dtypes)
def test_state_is_tensors_that_stack_and_numbers_that_save(name: str, dtype: torch.dtype, data: Any) -> None:
    problem = data.draw(problems(RULES[name], dtype))
    _, state = functional(problem, shared_step=True)
    assert state.keys() == problem.params.keys()
    for slots in state.values():
        assert all(isinstance(leaf, Tensor) for leaf in slots.values())
        assert slots["step"].shape == () and slots["step"].dtype == torch.int64
    fresh = problem.rule.init(problem.params, problem.info)
    assert tree.map_tree(lambda leaf: (leaf.shape, leaf.dtype), fresh) == tree.map_tree(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    several = tree.stack([state, fresh, state])
    assert_same(tree.index(several, 1), fresh)
    assert_same(tree.index(several, 2), state)
    stepper = Stepper(problem)
    stepper.run()
    for slots in stepper.optimizer.state_dict()["state"].values():
        assert all(isinstance(value, (Tensor, int, float)) for value in slots.values())


# -- independence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_TENSOR)
@settings(max_examples=20)
@given(data=st.data(), dtype=dtypes, execution=executions)
def test_two_param_groups_behave_as_two_optimizers(name: str, dtype: torch.dtype, execution: Any, data: Any) -> None:
    few = ((4, 4), (3, 5), (7,), (3, 2, 2, 2), ())  # so that both groups have tensors of one shape
    left = data.draw(problems(BY_TENSOR[name], dtype, steps=3, shapes=few))
    alike = data.draw(st.booleans())  # groups of other options are stepped apart
    right = data.draw(problems(left.rule, dtype, steps=3, shapes=few, other_options=not alike))
    apart = [Stepper(problem, execution=execution) for problem in (left, right)]
    together = [Stepper(problem) for problem in (left, right)]
    groups = [{"params": list(s.params.values()), **s.problem.rule.values()} for s in together]
    together[0].optimizer = together[1].optimizer = RuleOptimizer(BY_TENSOR[name], groups, execution, HORIZON)
    for t in range(3):
        for stepper in apart:
            stepper.step(stepper.problem.grads[t])
        for stepper in together:
            for key, p in stepper.params.items():
                p.grad = stepper.problem.grads[t][key].clone()
        together[0].optimizer.step()
    for one, other in zip(apart, together, strict=True):
        assert_same(other.result()[0], one.result()[0])
        assert_same(other.result()[1], one.result()[1])


@pytest.mark.parametrize("name", BY_TENSOR)
@settings(max_examples=12)
@given(data=st.data(), dtype=dtypes, execution=executions)
def test_steps_are_counted_per_parameter(name: str, dtype: torch.dtype, execution: Any, data: Any) -> None:
    """A parameter that has no gradient at some steps moves as if it were alone and these steps had not been."""
    problem = data.draw(problems(BY_TENSOR[name], dtype, steps=5))
    present = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    late = next(reversed(problem.params))
    stepper = Stepper(problem, execution=execution)
    for given_, there in zip(problem.grads, present, strict=True):
        stepper.step({key: g for key, g in given_.items() if key != late or there})
    grads = tuple({late: g[late]} for g, there in zip(problem.grads, present, strict=True) if there)
    params, state = Stepper(
        replace(problem, params={late: problem.params[late]}, grads=grads), execution=execution
    ).run()
    assert_same({late: stepper.result()[0][late]}, params)
    assert_same({late: stepper.result()[1][late]}, state)


bad_numbers = st.sampled_from([math.nan, math.inf, -math.inf])


def poisoned(problem: Problem, key: str, bad: float) -> Problem:
    """The same, with one bad entry in the first gradient of one tensor."""
    grad = problem.grads[0][key].clone()
    grad.view(-1)[-1] = bad
    return replace(problem, grads=({**problem.grads[0], key: grad}, *problem.grads[1:]))


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=8)
@given(data=st.data(), dtype=dtypes, bad=bad_numbers)
def test_bad_gradient_of_one_copy_stays_in_that_copy(name: str, dtype: torch.dtype, bad: float, data: Any) -> None:
    several = data.draw(copies(RULES[name], dtype, 3, shapes=FILLED))
    with_bad = [several[0], poisoned(several[1], "w0", bad), several[2]]
    clean, got = vmapped(several), vmapped(with_bad)
    for k in (0, 2):
        assert_same(got[k][0], clean[k][0])
        assert_same(got[k][1], clean[k][1])


@pytest.mark.parametrize("name", RULES)
def test_bad_copy_of_an_unroll_freezes_and_the_others_go_on(name: str) -> None:
    rule, task = RULES[name], Bowl()
    carry = start(task, rule, [0, 1, 2])
    broken = {**carry.params, "b": carry.params["b"].clone()}
    broken["b"][1, 2] = math.nan
    want, after = unroll(task, rule, carry, 3)
    losses, got = unroll(task, rule, Carry(broken, *list(carry.tree().values())[1:]), 3)
    others = torch.tensor([0, 2])
    assert_same({"losses": losses[others]}, {"losses": want[others]})
    assert_same(tree.index(got.params, others), tree.index(after.params, others))
    assert_same(tree.index(got.state, others), tree.index(after.state, others))
    assert got.alive.tolist() == [True, False, True] and got.step.tolist() == [3, 0, 3]
    assert losses[1].isnan().all()
    assert_same(tree.index(got.params, 1), tree.index(broken, 1))


@pytest.mark.parametrize("name", BY_TENSOR)
@settings(max_examples=8)
@given(data=st.data(), dtype=dtypes, bad=bad_numbers, execution=executions)
def test_bad_gradient_of_one_tensor_stays_in_that_tensor(
    name: str, dtype: torch.dtype, bad: float, execution: Any, data: Any
) -> None:
    problem = data.draw(problems(BY_TENSOR[name], dtype, shapes=FILLED))
    worse = poisoned(problem, "w0", bad)
    runs = [
        (functional(problem, shared_step=True), functional(worse, shared_step=True)),
        (Stepper(problem, execution=execution).run(), Stepper(worse, execution=execution).run()),
    ]
    for clean, got in runs:
        spared = clean[0].keys() - {"w0"}
        assert_same({key: got[0][key] for key in spared}, {key: clean[0][key] for key in spared})
        assert_same({key: got[1][key] for key in spared}, {key: clean[1][key] for key in spared})
        if name in ELEMENTWISE:
            rest = slice(None, -1)
            assert_same({"w0": got[0]["w0"].view(-1)[rest]}, {"w0": clean[0]["w0"].view(-1)[rest]})
        elif math.isnan(bad):
            assert not got[0]["w0"].isfinite().all()


# -- purity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=8)
@given(data=st.data(), dtype=dtypes, execution=executions, shared=st.booleans())
def test_update_mutates_nothing_and_the_optimizer_no_gradient(
    name: str, dtype: torch.dtype, execution: Any, shared: bool, data: Any
) -> None:
    problem = data.draw(problems(RULES[name], dtype, steps=2))
    params, state = problem.params, problem.rule.init(problem.params, problem.info)
    for t, given_ in enumerate(problem.grads):
        inputs = {"params": params, "state": state, "grads": given_}
        before = tree.map_tree(torch.clone, inputs)
        versions = [leaf._version for leaf in tree.leaves(inputs)]
        params, state = advance(problem, params, state, given_, problem.rule.hp, torch.tensor(t) if shared else None)
        assert_same(inputs, before)
        assert [leaf._version for leaf in tree.leaves(inputs)] == versions
    if "closure" in problem.rule.requirements():
        return  # there it is the closure that sets gradients
    stepper = Stepper(problem, execution=execution)
    for given_ in problem.grads:
        for key, p in stepper.params.items():
            p.grad = given_[key].clone()
        grads = {key: p.grad for key, p in stepper.params.items()}
        stepper.optimizer.step()
        assert all(stepper.params[key].grad is grad for key, grad in grads.items())
        assert_same(grads, given_)


# -- differentiability -------------------------------------------------------------------------------------------------


def ordinary(rule: UpdateRule, seed: int, zeros: float) -> Problem:
    """Three steps in float64 at hyperparameters well inside the domain, where no jump of a rule is near."""
    shapes = [(6,), (3, 4), (2, 2, 3), ()]
    return make_problem(rule.replaced(**middle(rule)), torch.float64, shapes, 3, seed, zeros, decades=(-1.0, 0.5))


def trained(problem: Problem, hp: dict[str, Any]) -> Tensor:
    """One number that depends on every final parameter."""
    params, _ = functional(problem, shared_step=True, hp=hp)
    moves = torch.cat([(params[key] - p).reshape(-1) for key, p in problem.params.items()])
    return (moves * torch.linspace(0.5, 1.5, len(moves), dtype=torch.float64)).sum()


@pytest.mark.parametrize("zeros", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", RULES)
def test_derivative_in_every_hyperparameter_is_finite_where_gradients_are_zero(name: str, zeros: float) -> None:
    problem = ordinary(RULES[name], seed=11, zeros=zeros)
    hp = tree.map_tree(_leaf, problem.rule.hp)
    leaves = [leaf for value in hp.values() for leaf in (value if isinstance(value, tuple) else (value,))]
    found = torch.autograd.grad(trained(problem, hp), leaves, allow_unused=True)
    assert all(derivative is None or derivative.isfinite() for derivative in found), dict(zip(hp, found, strict=False))


def _leaf(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_leaf(entry) for entry in value)
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_derivative_in_lr_agrees_with_differences_backward_and_forward(name: str, seed: int) -> None:
    """Central differences of relative width 1e-4: truncated at 1e-8, rounded at 1e-12 of the sizes."""
    problem = ordinary(RULES[name], seed, zeros=0.2)

    def final(lr: Tensor) -> Tensor:
        return trained(problem, {**problem.rule.hp, "lr": lr})

    lr = torch.tensor(problem.rule.hp["lr"], dtype=torch.float64, requires_grad=True)
    value = final(lr)
    (backward,) = torch.autograd.grad(value, lr)
    _, forward = torch.func.jvp(final, (lr.detach(),), (torch.ones_like(lr),))
    with torch.no_grad():
        width = 1e-4 * lr
        differences = (final(lr + width) - final(lr - width)) / (2 * width)
    scale = abs(value.detach() / lr.detach()) + abs(differences)
    assert abs(backward - differences) <= 1e-6 * scale
    assert abs(forward - backward) <= 1e-12 * scale


def test_params_are_part_of_no_graph_unless_asked_for() -> None:
    """An optimizer step on tensors that require gradients records nothing."""
    for rule in RULES.values():
        stepper = Stepper(make_problem(rule, torch.float32, [(3,), (2, 2)], 1, seed=0))
        params, state = stepper.run()
        flat: Params = {
            **params,
            **{f"{k}/{s}": v for k, slots in state.items() for s, v in slots.items() if s != "step"},
        }
        assert not any(value.requires_grad for value in flat.values())
