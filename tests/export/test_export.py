"""An exported file is the platform's optimizer, without the platform."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import export_runner
import pytest
import torch

from metaopt import registry
from metaopt.export import ExportError, write_module
from metaopt.rule import Chain, ElementwiseRule, UpdateRule
from metaopt.space import Hyper, learning_rate
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_classic.adam import Adam, AdamW
from metaopt_classic.lion import Lion
from metaopt_classic.muon import Muon
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import SAM, Cautious, ClipByGlobalNorm, DecoupledWeightDecay, Lookahead
from metaopt_learned.adafac_mlp import AdafacMLP


def _learned(**options: Any) -> UpdateRule:
    learned = AdafacMLP(**options)
    theta = learned.init_theta(torch.Generator().manual_seed(1))
    return learned.bind({name: value + 0.01 for name, value in theta.items()})


class Without(ElementwiseRule):
    """Plain descent, without a docstring worth the name \\ and "quotes"."""

    lr: float = learning_rate(1e-2, search=(1e-3, 1e-1))

    def elementwise(self, param: Any, grad: Any, lr: Any) -> Any:  # type: ignore[override]
        return param - lr * grad


HORIZON = 50

RULES: dict[str, UpdateRule] = {
    **{name: registry.create("optimizer", name) for name in registry.specs("optimizer")},
    "adamw_tuned": AdamW(lr=0.01, betas=(0.8, 0.95), weight_decay=0.3),
    "clipped": Chain(ClipByGlobalNorm(0.5), AdamW()),
    "lookahead": Lookahead(SGD(momentum=0.9, nesterov=True), k=3),
    "cautious": Cautious(Lion()),
    "decayed": DecoupledWeightDecay(Without()),
    "muon_lookahead": Lookahead(Muon(scaling="original", bias_correction=True), k=2),
    "sam": SAM(Adam()),
    "deep": Chain(ClipByGlobalNorm(2.0), Lookahead(Cautious(AdamW()), lookahead_alpha=0.3, k=4)),
    "learned": _learned(hidden=8, step_scale=0.01),
    "learned_clipped": Chain(ClipByGlobalNorm(1.0), _learned()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    return {name: write_module(rule, f"My_{name}", folder / f"my_{name}.py") for name, rule in RULES.items()}


@pytest.fixture(scope="module")
def outside(files: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What the files do in an interpreter without metaopt: one process for all."""
    jobs = []
    for name, path in files.items():
        rule = RULES[name]
        bad = {key: _bad(declared) for key, declared in rule.declared().items() if isinstance(declared, Hyper)}
        class_name = "My" + "".join(part.capitalize() for part in name.split("_"))
        second_lr = rule.hp["lr"] * 0.5
        job = {"id": name, "path": str(path), "name": class_name, "arguments": _needed(rule)}
        job |= {"second_lr": second_lr, "bad": bad}
        jobs.append(job)
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-I", "-W", "error", export_runner.__file__, "jobs.pt", "results.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)


def _needed(rule: UpdateRule) -> dict[str, int]:
    return {"horizon": HORIZON} if "horizon" in rule.requirements() else {}


def _bad(declared: Hyper) -> Any:
    bad = declared.low - 1 if math.isfinite(declared.low) else math.nan
    return (bad,) * len(declared.default) if isinstance(declared.default, tuple) else bad


def _inside(name: str, dtype: torch.dtype, steps: int = export_runner.STEPS) -> list[dict[str, torch.Tensor]]:
    rule = RULES[name]
    make = lambda given: RuleOptimizer(rule, given, **_needed(rule))  # noqa: E731
    return export_runner.trajectory(make, dtype, rule.hp["lr"] * 0.5, steps=steps)


def _distance(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> float:
    """Largest relative difference over all steps, tensor by tensor."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        for name in b:
            difference = (a[name].double() - b[name].double()).abs().max() / b[name].double().abs().max()
            worst = max(worst, float(difference))
    return worst


@pytest.mark.parametrize("name", RULES)
def test_file_gives_the_platforms_parameters_in_float64(name: str, outside: dict[str, Any]) -> None:
    wanted = _inside(name, torch.float64)
    assert _distance(outside[name]["torch.float64"], wanted) <= 1e-12
    assert _distance(outside[name]["interrupted"], wanted) <= 1e-12, "state_dict and pickle lose nothing"


@pytest.mark.parametrize("name", RULES)
def test_file_gives_the_platforms_parameters_in_float32(name: str, outside: dict[str, Any]) -> None:
    assert _distance(outside[name]["torch.float32"], _inside(name, torch.float32)) <= 2e-5


@pytest.mark.parametrize("name", RULES)
def test_bf16_parameters_keep_float32_state(name: str, outside: dict[str, Any]) -> None:
    wanted = _inside(name, torch.bfloat16, steps=5)
    assert _distance(outside[name]["bf16"], wanted) <= 2**-7
    assert outside[name]["bf16_state"] <= {"torch.float32"}


@pytest.mark.parametrize("name", RULES)
def test_bad_hyperparameters_are_refused_with_their_range(name: str, outside: dict[str, Any]) -> None:
    for key, declared in RULES[name].declared().items():
        if isinstance(declared, Hyper):
            message = outside[name]["refusals"][key]
            assert message.startswith(f"{key} must be ") and f"in {declared.domain}" in message


@pytest.mark.parametrize("name", RULES)
def test_file_imports_torch_and_the_standard_library_only(name: str, files: dict[str, Path]) -> None:
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            root = (module or "").split(".")[0]
            assert root == "torch" or root in sys.stdlib_module_names


def test_files_pass_ruff(files: dict[str, Path], folder: Path) -> None:
    rules = ["--isolated", "--no-cache", "--select", "E,F,W", "--line-length", "120"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *rules, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_elementwise_file_reads_like_the_paper(files: dict[str, Path]) -> None:
    text = files["adamw"].read_text()
    for line in (
        "def my_adamw_update(param, grad, exp_avg, exp_avg_sq, *, lr, beta1, beta2, eps, weight_decay, t):",
        "    new_exp_avg = beta1 * exp_avg + (1 - beta1) * grad",
        "    betas: tuple[float, float] = (0.9, 0.999),",
        "Loshchilov and Hutter, 2019",
        "betas: EMA decays, in [0, 1).",
    ):
        assert line in text
    assert len(text.splitlines()) < 150


def test_writing_twice_gives_the_same_text(tmp_path: Path, files: dict[str, Path]) -> None:
    again = write_module(RULES["deep"], "My_deep", tmp_path / "my_deep.py")
    assert again.read_text() == files["deep"].read_text()


def test_large_theta_lies_beside_the_file(tmp_path: Path) -> None:
    rule = _learned()
    path = write_module(rule, "Small", tmp_path / "small.py", theta_limit=10)
    kept = torch.load(tmp_path / "small.theta.pt", weights_only=True)
    assert sum(value.numel() for value in kept.values()) == sum(v.numel() for v in rule.theta.values())  # type: ignore[attr-defined]
    make = export_runner.load(path).Small
    found = export_runner.trajectory(make, torch.float64, 0.5, steps=5)
    wanted = export_runner.trajectory(lambda given: RuleOptimizer(rule, given), torch.float64, 0.5, steps=5)
    assert _distance(found, wanted) <= 1e-12


@pytest.mark.parametrize("name", ["", "two words", "class", "1st", "optimizer", "../x"])
def test_names_that_python_or_the_file_cannot_use_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="name must"):
        write_module(SGD(), name, tmp_path / "x.py")
    assert not list(tmp_path.iterdir())


def test_unbound_learned_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"rule\.bind"):
        write_module(AdafacMLP(), "Mlp", tmp_path / "x.py")  # type: ignore[arg-type]
    theta = {name: torch.stack([value] * 2) for name, value in AdafacMLP().init_theta(torch.Generator()).items()}
    with pytest.raises(TypeError, match="one rule per copy"):
        write_module(AdafacMLP().bind(theta, stacked=True), "Mlp", tmp_path / "x.py")
