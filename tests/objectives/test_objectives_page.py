"""docs/objectives.md names every objective, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt
from metaopt import registry
from metaopt.objective import INPUTS, faults
from metaopt.program import ProgramObjective
from metaopt_symbolic.genome import LOSS_SEEDS, parse

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("kind", INPUTS)
def test_the_table_has_every_objective_of_the_kind(kind: str) -> None:
    (row,) = re.findall(rf"^\| `{kind}` \|[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    listed = re.findall(r"\b[a-z]+(?:_[a-z0-9]+)*\b", re.sub(r"found by language models|\(DiscoPOP\)", "", row))
    assert sorted(listed) == sorted(n for n, spec in registry.specs("objective").items() if spec.tags[0] == kind)


def test_the_examples_run(tmp_path: Path) -> None:
    call, own, program, task = BLOCKS[1:]
    namespace: dict[str, Any] = {}
    exec(call, namespace)
    rho = torch.tensor([2.0, -7.0])
    torch.testing.assert_close(namespace["losses"], torch.log1p(torch.exp(-0.05 * rho)))
    (tmp_path / "my_losses.py").write_text(own)
    mine = metaopt.create("objective", f"{tmp_path / 'my_losses.py'}:SquaredHinge")
    assert faults(mine) == [] and not mine.program.is_rule
    loss = ProgramObjective(parse(program).program())
    assert parse(program).text() == LOSS_SEEDS["dpo"] and faults(loss) == []
    exec(task, namespace)
    made, params, batch = (namespace[name] for name in ("task", "params", "batch"))
    assert made.normalize(made.loss(params, batch)).item() == pytest.approx(1.0, abs=0.1)
    assert made.win_rate(params, batch).item() == pytest.approx(0.5, abs=0.02)
    assert made.kl(params, batch).item() == pytest.approx(0.0, abs=0.02)
    named = metaopt.create("task", "preference_noisy_ipo_mlp16", objective=mine)
    assert named.objective is mine


def test_the_warning_about_lrml_is_right() -> None:
    rho = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    metaopt.create("objective", "lrml")({"rho": rho}).sum().backward()
    assert rho.grad is not None and rho.grad.item() > 0
