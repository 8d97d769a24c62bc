"""Every learned optimizer leaves the house as one file of plain torch, and steps there as it does here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import export_runner
import pytest
import torch
from functional_form import Functional

from metaopt import registry
from metaopt.cli import main
from metaopt.export import write_module
from metaopt.export.module import camel_case
from metaopt.learned import BoundRule
from metaopt.resolve import THETA_FILE, save_theta

NAMES = list(registry.specs("learned_optimizer"))
STEPS, HORIZON = 20, 30


def _rule(name: str) -> BoundRule:
    """With numbers of its own everywhere: what starts at zero would hide a feature that is left out."""
    learned = registry.create("learned_optimizer", name)
    generator = torch.Generator().manual_seed(1)
    theta = learned.init_theta(generator)
    return learned.bind({k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in theta.items()})


def _needed(rule: BoundRule) -> dict[str, int]:
    return {"horizon": HORIZON} if "horizon" in rule.requirements() else {}


@pytest.fixture(scope="module")
def rules() -> dict[str, BoundRule]:
    return {name: _rule(name) for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learned")


@pytest.fixture(scope="module")
def outside(rules: dict[str, BoundRule], folder: Path) -> dict[str, Any]:
    """What the files do in an interpreter without metaopt: one process for all."""
    jobs = []
    for name, rule in rules.items():
        path = write_module(rule, name, folder / f"{name}.py")
        job = {"id": name, "path": str(path), "name": camel_case(name), "arguments": _needed(rule), "bad": {}}
        jobs.append({**job, "second_lr": 0.5 * rule.hp.get("lr", 1.0), "steps": STEPS, "dtypes": [torch.float64]})
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-I", "-W", "error", export_runner.__file__, "jobs.pt", "results.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)


def _inside(rule: BoundRule, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    make = lambda groups: Functional(rule, groups, HORIZON)  # noqa: E731
    return export_runner.trajectory(make, dtype, 0.5 * rule.hp.get("lr", 1.0), steps=STEPS)


def _distance(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> float:
    """Largest difference over all steps, relative to the largest entry of each tensor."""
    return max(
        float((a[name] - b[name]).abs().max() / b[name].abs().max())
        for a, b in zip(found, wanted, strict=True)
        for name in b
    )


@pytest.mark.parametrize("name", NAMES)
def test_file_steps_as_the_rule_in_float64(name: str, rules: dict[str, BoundRule], outside: dict[str, Any]) -> None:
    wanted = _inside(rules[name], torch.float64)
    assert any(not torch.equal(wanted[-1][key], value) for key, value in export_runner.start(torch.float64).items())
    assert _distance(outside[name]["torch.float64"], wanted) <= 1e-12
    assert _distance(outside[name]["interrupted"], wanted) <= 1e-12, "state_dict and pickle lose no recurrent state"


@pytest.mark.parametrize("name", NAMES)
def test_bf16_parameters_keep_float32_state(name: str, outside: dict[str, Any]) -> None:
    assert outside[name]["bf16_state"] <= {"torch.float32"}


def test_files_pass_ruff(outside: dict[str, Any], folder: Path) -> None:
    rules = ["--isolated", "--no-cache", "--select", "E,F,W", "--line-length", "120"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *rules, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["velo", "controller"])
def test_loss_may_be_given_without_a_closure(
    name: str, rules: dict[str, BoundRule], outside: dict[str, Any], folder: Path
) -> None:
    module = export_runner.load(folder / f"{name}.py")
    make, ends = getattr(module, camel_case(name)), []
    for with_closure in (True, False):
        params = export_runner.start(torch.float64)
        optimizer = make(list(params.values()), horizon=HORIZON)
        for step in range(3):
            optimizer.zero_grad()
            loss = export_runner.loss_at(params, step)
            loss.backward()
            if with_closure:
                optimizer.step(lambda loss=loss: loss)
            else:
                optimizer.step(loss=loss)
        ends.append(torch.cat([p.detach().flatten() for p in params.values()]))
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="needs the loss; call"):
        optimizer.step()
    with pytest.raises(TypeError, match="horizon"):
        make([torch.nn.Parameter(torch.ones(2))])


def test_command_exports_a_runs_directory(tmp_path: Path) -> None:
    rule = _rule("small_fc_lopt")
    save_theta(tmp_path / "run" / THETA_FILE, "small_fc_lopt", rule.learned, rule.theta)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "mine.py"), "--class", "Mine"]) == 0
    make = export_runner.load(tmp_path / "mine.py").Mine
    found = export_runner.trajectory(make, torch.float64, 0.5, steps=STEPS)
    assert _distance(found, _inside(rule, torch.float64)) <= 1e-12
