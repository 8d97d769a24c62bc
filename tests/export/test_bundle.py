"""The tree shaker: what of a user's module reaches the file, and what it says when something cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import export_runner
import pytest
import random_programs
import torch
import user_rules
from functional_form import Functional
from hypothesis import given, settings

from metaopt.export import ExportError, write_module
from metaopt.program import Program, evaluate
from metaopt.program.source import function_source
from metaopt.rule import Chain, UpdateRule
from metaopt.torch_optimizer import RuleOptimizer

RULES: dict[str, UpdateRule] = {
    "trust": user_rules.Trust(lr=0.02),
    "trust_once": user_rules.Trust(twice=False),
    "delegating": user_rules.Delegating(start=0.5),
    "normalised": Chain(user_rules.Normalised(), user_rules.Trust()),
    "corners": user_rules.Corners(initial=0.2),
    "nested_corners": Chain(user_rules.Normalised(), user_rules.Corners()),
}


def _same(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_users_rules_are_exported_as_they_run(name: str, tmp_path: Path) -> None:
    rule = RULES[name]
    module = export_runner.load(write_module(rule, "Exported", tmp_path / f"{name}.py"))
    found = export_runner.trajectory(module.Exported, torch.float64, 0.005, steps=12)
    functional = export_runner.trajectory(lambda groups: Functional(rule, groups), torch.float64, 0.005, steps=12)
    _same(found, functional)


def test_what_is_not_reached_is_not_in_the_file(tmp_path: Path) -> None:
    text = write_module(user_rules.Trust(), "Trust", tmp_path / "trust.py").read_text()
    for absent in ("never_called", "numpy", "Normalised", "learning_rate", "declared", "metaopt.space", "_INNER"):
        assert absent not in text
    for present in ("class Base(TensorRule):", "class TrustRule(Base):", "super().init_tensor(param", "FLOOR = 1e-3"):
        assert present in text
    assert text.index("class TrustRule") < text.index("class PerParameter"), "the rule comes before what it rests on"


def test_a_hyperparameter_that_init_reads_is_the_constructors(tmp_path: Path) -> None:
    module = export_runner.load(write_module(user_rules.Delegating(), "Late", tmp_path / "late.py"))
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = module.Late([p], start=2.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["extra"], torch.full_like(p, 1.0))


def test_loss_and_horizon_reach_the_rule(tmp_path: Path) -> None:
    rule = user_rules.Polyak()
    module = export_runner.load(write_module(rule, "Polyak", tmp_path / "polyak.py"))

    def run(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, with_closure: bool) -> torch.Tensor:
        for _ in range(5):

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = (p**2).sum()
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                optimizer.step(loss=closure())  # type: ignore[call-arg]
        return p.detach()

    start = torch.arange(4.0, dtype=torch.float64)
    ways = []
    for with_closure in (True, False):
        ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        ways.append(run(module.Polyak([ours], horizon=10), ours, with_closure))
        ways.append(run(RuleOptimizer(rule, [theirs], horizon=10), theirs, with_closure))
    for other in ways[1:]:
        torch.testing.assert_close(ways[0], other, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="Polyak needs the loss"):
        module.Polyak([torch.nn.Parameter(start)], horizon=10).step()
    with pytest.raises(TypeError, match="horizon"):
        module.Polyak([torch.nn.Parameter(start)])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (user_rules.UsesNumpy, r"UsesNumpy\.direction uses np\.sqrt of numpy, but an exported file may import torch"),
        (user_rules.UsesDeclarations, r"uses self\.hp, a part of metaopt's declarations"),
        (user_rules.UsesClasses, r"uses the class AdamW itself"),
        (user_rules.UsesModule, r"UsesModule\.out is a .*, which cannot be written as source"),
        (user_rules.UsesUndefined, r"uses nowhere, which is not defined"),
    ],
)
def test_what_one_file_cannot_hold_is_named(rule: type[UpdateRule], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        write_module(rule(), "Refused", tmp_path / "refused.py")
    assert not list(tmp_path.iterdir()), "a refused export leaves no file"


_TYPED_IN = """
import torch
from metaopt.rule import ElementwiseRule, TensorRule
from metaopt.space import learning_rate

class Typed(ElementwiseRule):
    lr: float = learning_rate(0.1, search=(1e-3, 1.0))
    def elementwise(self, param, grad, lr):
        return param - lr * torch.sign(grad)

class TypedTensor(TensorRule):
    lr: float = learning_rate(0.1, search=(1e-3, 1.0))
    def init_tensor(self, param, info):
        return {}
    def update_tensor(self, grad, slots, param, hp, t, info):
        return param - hp["lr"] * grad, {}
"""


def test_elementwise_rules_need_no_source_and_others_say_so(tmp_path: Path) -> None:
    typed: dict[str, Any] = {"__name__": "__main__"}
    exec(_TYPED_IN, typed)
    text = write_module(typed["Typed"](), "Typed", tmp_path / "typed.py").read_text()
    assert "return param - lr * torch.sign(grad)" in text
    with pytest.raises(ExportError, match=r"source of TypedTensor\.\w+ cannot be found"):
        write_module(typed["TypedTensor"](), "Tensor2", tmp_path / "typed_tensor.py")


def _run_printed(program: Program, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    names: dict[str, Any] = {"torch": torch}
    exec(function_source(program, "f"), names)
    used = {arg for s in program.statements for arg in s.args} | set(program.outputs)
    scalars = {name: value for name, value in random_programs.SCALARS.items() if name in used & set(program.scalars)}
    found = names["f"](**tensors, **scalars)
    return list(found) if isinstance(found, tuple) else [found]


@settings(max_examples=150)
@given(random_programs.exact_programs())
def test_printed_programs_compute_what_evaluate_does(program: Program) -> None:
    columns = random_programs.small_integers(program, sizes=(7,))
    tensors = {name: column[0] for name, column in zip(program.tensors, columns, strict=True)}
    found = _run_printed(program, tensors)
    wanted = evaluate(program, tensors, random_programs.SCALARS)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
        assert all(a.data_ptr() != t.data_ptr() for t in tensors.values()), "no output is an input"
