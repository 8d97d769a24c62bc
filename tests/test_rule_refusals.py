"""A bad hyperparameter is refused wherever it enters, with its name and what is allowed; for every registered rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_strategies import COUPLED_WRAPPERS, HORIZON, REGISTERED, RULES, Bowl, outside

import metaopt
from metaopt import registry
from metaopt.rule import UpdateRule
from metaopt.space import Hyper
from metaopt.torch_optimizer import RuleOptimizer
from metaopt.unroll import start, unroll


def make(rule: UpdateRule, params: Any, **arguments: Any) -> RuleOptimizer:
    return metaopt.optimizer(rule, params, horizon=HORIZON, **arguments)


def refusing(rule: UpdateRule, name: str, value: Any) -> list[Any]:
    """The places where a user's value enters."""
    weight = torch.zeros(2, requires_grad=True)
    carry = start(Bowl(), rule, [0, 1])
    return [
        lambda: rule.replaced(**{name: value}),
        lambda: make(rule, [weight], **{name: value}),
        lambda: make(rule, [{"params": [weight], name: value}]),
        lambda: unroll(Bowl(), rule, carry, 1, hp={name: value}),
    ]


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=15)
@given(data=st.data())
def test_hyperparameter_outside_its_domain_is_refused_with_the_domain(name: str, data: Any) -> None:
    rule = RULES[name]
    which = data.draw(st.sampled_from(sorted(rule.hp)))
    declared = rule.declared()[which]
    assert isinstance(declared, Hyper)
    bad = data.draw(outside(declared))
    value: Any = bad
    if isinstance(declared.default, tuple):
        at = data.draw(st.integers(0, len(declared.default) - 1))
        value = (*declared.default[:at], bad, *declared.default[at + 1 :])
    places = refusing(rule, which, value)
    if not isinstance(value, tuple):
        several = torch.tensor([declared.default, bad], dtype=torch.float64)  # one value per copy
        places.append(lambda: unroll(Bowl(), rule, start(Bowl(), rule, [0, 1]), 1, hp={which: several}))
    if not rule.parts():
        places.append(lambda: type(rule)(**{which: value}))
    if name in REGISTERED:
        places.append(lambda: registry.create("optimizer", name, **{which: value}))
        places.append(lambda: metaopt.optimizer(name, [torch.zeros(1)], **{which: value}))
    for place in places:
        with pytest.raises(ValueError) as refusal:
            place()
        assert which in str(refusal.value) and declared.domain in str(refusal.value)


@pytest.mark.parametrize("name", RULES)
def test_number_of_values_must_be_that_of_copies(name: str) -> None:
    rule = RULES[name]
    with pytest.raises(ValueError, match=r"lr must be one number or one per copy \[2\]"):
        unroll(Bowl(), rule, start(Bowl(), rule, [0, 1]), 1, hp={"lr": torch.tensor([0.1, 0.1, 0.1])})


@pytest.mark.parametrize("name", RULES)
def test_hyperparameter_of_another_kind_is_refused(name: str) -> None:
    rule = RULES[name]
    for which, value in rule.hp.items():
        domain = rule.declared()[which].domain
        lengths: tuple[Any, ...] = ((0.1, 0.1),)
        if isinstance(value, tuple):
            lengths = ((*value, 0.5), value[:-1], value[0])
        for wrong in ("0.1", None, True, {}, *lengths):
            for place in refusing(rule, which, wrong):
                with pytest.raises(TypeError) as refusal:
                    place()
                assert which in str(refusal.value) and domain in str(refusal.value)


@pytest.mark.parametrize("name", RULES)
def test_unknown_hyperparameter_is_refused_with_the_known_ones(name: str) -> None:
    """Not in groups: as in torch, they may carry keys of the user's own."""
    constructed, optimized, _, unrolled = refusing(RULES[name], "no_such", 0.1)
    places = [constructed, optimized, unrolled]
    if name in REGISTERED:
        places.append(lambda: metaopt.optimizer(name, [torch.zeros(1)], no_such=0.1))
    for place in places:
        with pytest.raises(TypeError) as refusal:
            place()
        assert "'no_such'" in str(refusal.value) and all(which in str(refusal.value) for which in RULES[name].hp)


@pytest.mark.parametrize("name", RULES)
def test_value_that_a_schedule_sets_is_refused_before_anything_moves(name: str) -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = make(RULES[name], [weight])
    weight.grad = torch.ones(2)
    optimizer.param_groups[0]["lr"] = -0.5
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got -0.5"):
        optimizer.step(lambda: torch.zeros(()))
    assert weight.tolist() == [1, 1]


@pytest.mark.parametrize("name", RULES)
def test_refused_group_leaves_the_optimizer_as_it_was(name: str) -> None:
    optimizer = make(RULES[name], [torch.zeros(2)])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [torch.zeros(3)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", RULES)
def test_declarations_are_consistent(name: str) -> None:
    for declared in RULES[name].declared().values():
        if isinstance(declared, Hyper):
            defaults = declared.default if isinstance(declared.default, tuple) else (declared.default,)
            assert all(map(declared.contains, (*defaults, *(declared.search or ()))))
            assert declared.doc or name not in REGISTERED
            assert all(map(declared.contains, declared.grid(7)))


def test_groups_of_a_rule_that_couples_them_must_agree_on_what_couples() -> None:
    rule = COUPLED_WRAPPERS["clip_adamw"]
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "max_norm": 3.0}]
    optimizer = make(rule, groups)
    for weight in weights:
        weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.step()
    optimizer.param_groups[1]["max_norm"] = 1.0
    optimizer.step()
    assert (1 - weights[0]).min() > 50 * (1 - weights[1]).max() > 0  # each with its own lr


@pytest.mark.parametrize(
    "declared",
    [
        Hyper(0.5),
        Hyper(0.5, 0.0),
        Hyper(0.5, 0.0, 1.0, scale="log"),
        Hyper(0.5, 0.0, 1.0, open_high=True),
        Hyper(0.5, 0.0, 1.0, scale="decay"),
    ],
)
def test_grid_is_refused_where_the_domain_cannot_be_spread_over(declared: Hyper) -> None:
    with pytest.raises(ValueError, match=r"give search=\(low, high\)"):
        declared.grid(5)
