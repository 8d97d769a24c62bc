"""What docs/learned-optimizers.md says and shows is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt
from metaopt import registry
from metaopt.learned import LearnedRule
from metaopt.perparameter import PerParameterRule
from metaopt.unroll import start, unroll

PAGE = (Path(__file__).parents[2] / "docs" / "learned-optimizers.md").read_text("utf-8")


def test_random_theta_makes_a_torch_optimizer_as_shown_and_as_the_error_says() -> None:
    (text,) = (
        block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if "bind" in block
    )
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    written: dict[str, Any] = {"metaopt": metaopt, "torch": torch, "model": model}
    exec(text, written)
    written["optimizer"].step()
    assert not torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="without meta-parameters; meta-train it") as refusal:
        metaopt.optimizer("small_fc_lopt", model)
    advice = str(refusal.value).split("bind random ones: ")[1]
    exec(advice, written)
    metaopt.optimizer(written["rule"], model).step()
    with pytest.raises(TypeError, match=r"AdafacMLP has no meta-parameters; give learned\.bind"):
        metaopt.optimizer(written["learned"], model)


@pytest.fixture
def tiny() -> PerParameterRule:
    (text,) = (
        block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if "class" in block
    )
    written: dict[str, Any] = {"__name__": __name__}
    exec(text, written)
    rule = written["Tiny"]()
    assert isinstance(rule, PerParameterRule)
    return rule


@pytest.mark.parametrize("execution", ["plain", "foreach", "fused"])
def test_the_rule_of_the_page_is_a_torch_optimizer_whose_lr_counts(tiny: PerParameterRule, execution: Any) -> None:
    bound = tiny.bind(tiny.init_theta(torch.Generator().manual_seed(0)))
    moves = []
    for lr in (1.0, 0.5):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))
        before = p.detach().clone()
        p.grad = p.detach().cos()
        metaopt.optimizer(bound, [p], lr=lr, execution=execution).step()
        moves.append(p.detach() - before)
    assert moves[0].abs().max() > 1e-5
    torch.testing.assert_close(moves[1], 0.5 * moves[0], rtol=1e-9, atol=1e-15)


def test_the_rule_of_the_page_runs_copies_in_an_unroll_and_differentiates(tiny: PerParameterRule) -> None:
    task = registry.create("task", "digits_mlp")
    theta = {name: value.requires_grad_() for name, value in tiny.init_theta(torch.Generator().manual_seed(0)).items()}
    bound = tiny.bind(theta)
    losses, _ = unroll(task, bound, start(task, bound, [0, 1]), 5, hp={"lr": torch.tensor([1.0, 2.0])})
    assert not torch.equal(losses[0], losses[1])
    losses.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in theta.values())
    with torch.no_grad():
        again, _ = unroll(task, bound, start(task, bound, [0, 1]), 5, hp={"lr": torch.tensor([1.0, 2.0])})
    torch.testing.assert_close(again, losses.detach(), rtol=1e-5, atol=1e-7)  # by C++ where there is a compiler


def test_the_rule_of_the_page_can_be_exported(tmp_path: Path) -> None:
    (text,) = (
        block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if "class" in block
    )
    (tmp_path / "tiny_rule.py").write_text(text)
    learned = registry.create("learned_optimizer", f"{tmp_path / 'tiny_rule.py'}:Tiny")
    bound = learned.bind(learned.init_theta(torch.Generator().manual_seed(0)))
    written = registry.load("exporter", "torch")(bound, "Tiny_Export", tmp_path / "out.py")
    exported = runpy.run_path(str(written))["TinyExport"]
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    made = metaopt.optimizer(bound, models[0].parameters()), exported(models[1].parameters())
    for _ in range(3):
        for model, optimizer in zip(models, made, strict=True):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_table_says_what_every_learned_optimizer_needs_and_which_steps_in_place() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")
    ]
    told = {name: cells for cells in rows for name in re.findall(r"`(\w+)`", cells[0])}
    assert told.keys() == registry.specs("learned_optimizer").keys()
    for name, (_, _, needs, in_place, _) in told.items():
        rule: LearnedRule = registry.create("learned_optimizer", name)
        wanted = {what for what in ("loss", "horizon", "roles") if getattr(rule, f"needs_{what}")}
        only = re.search(r"roles \(`(\w+)`\)", needs)  # of the names in one row
        also = {"roles"} if only is not None and only[1] != name else set()
        assert set(re.findall("loss|horizon|roles", needs)) == wanted | also, name
        assert (in_place == "yes") == isinstance(rule, PerParameterRule), name
