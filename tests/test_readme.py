"""What the README shows works, from its own text, as a new user would do it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt
from metaopt.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
BLOCKS = [text for language, text in FENCED if language == "python"]


def test_there_are_as_many_tasks_as_it_says() -> None:
    named = [spec for spec in metaopt.specs("task").values() if spec.facts.get("suite")]
    families = {spec.facts["family"] for spec in named}
    assert f"{len(named)} named tasks in {len(families)} families" in README
    assert f"all {len(named)} and their families" in README


@pytest.fixture
def my_rule(tmp_path: Path) -> Path:
    (text,) = [block for block in BLOCKS if "class SignMomentum" in block]
    lines = [line for line in text.split("class SignMomentum")[1].splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 10, "the README promises a rule of ten lines"
    path = tmp_path / "my_rule.py"
    path.write_text(text)
    return path


def test_ten_line_rule_is_a_torch_optimizer(my_rule: Path) -> None:
    rule = metaopt.create("optimizer", f"{my_rule}:SignMomentum")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    inputs = torch.randn(64, 3)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]])
    optimizer = metaopt.optimizer(rule, model.named_parameters(), lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss < 0.01


def test_ten_line_rule_races(my_rule: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["race", f"{my_rule}:SignMomentum", "adamw", "--tasks", "digits_mlp", "--seeds", "2", "--steps", "30"]
    assert main([*arguments, "--grid", "3", "--tune-seeds", "1", "--out", str(tmp_path / "race")]) == 0
    printed = capsys.readouterr().out
    assert "SignMomentum" in printed
    assert "adamw" in printed
    assert {path.suffix for path in (tmp_path / "race").iterdir()} >= {".json", ".png"}


def test_ten_line_rule_exports(my_rule: Path, tmp_path: Path) -> None:
    to = tmp_path / "sign_momentum.py"
    assert main(["export", f"{my_rule}:SignMomentum", "--to", str(to)]) == 0
    assert "import metaopt" not in to.read_text()
    spec = importlib.util.spec_from_file_location("sign_momentum", to)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    rule = metaopt.create("optimizer", f"{my_rule}:SignMomentum")
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    pair = (metaopt.optimizer(rule, [ours], lr=0.1), module.SignMomentum([theirs], lr=0.1))
    for step in range(50):
        for p, optimizer in zip((ours, theirs), pair, strict=True):
            p.grad = torch.sin(p.detach() * 3 + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_composition_and_own_problem_examples_run(my_rule: Path) -> None:
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(3, 1), torch.randn(64, 3)
    scope: dict[str, Any] = {
        "metaopt": metaopt,
        "torch": torch,
        "model": model,
        "inputs": inputs,
        "targets": inputs.sum(1, keepdim=True),
        "SignMomentum": type(metaopt.create("optimizer", f"{my_rule}:SignMomentum")),
    }
    chosen = [text for text in BLOCKS if "Lookahead" in text or "from_module" in text]
    assert len(chosen) == 2
    for text in chosen:
        exec(compile(text, "README.md", "exec"), scope)

    def closure() -> torch.Tensor:
        scope["optimizer"].zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), scope["targets"])
        loss.backward()
        return loss

    before = scope["optimizer"].step(closure)
    assert closure() < before
    assert sorted(scope["result"].ranking) == ["adamw", "mine"]


def test_hypergradient_example_runs() -> None:
    (text,) = [block for block in BLOCKS if "hypergradient" in block]
    scope: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), scope)
    assert scope["losses"].shape == (64, 20)
    assert torch.isfinite(scope["hypergradient"]).all()
    assert scope["hypergradient"].abs().max() > 0


def test_meta_train_race_and_export_commands_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [text for _, text in FENCED if "metaopt meta-train" in text]
    monkeypatch.chdir(tmp_path)
    short = {"--steps": "2", "--horizon": "6"}
    for line in block.strip().splitlines():
        words = line.split()[1:]
        for option, value in short.items():
            if option in words:
                words[words.index(option) + 1] = value
        if words[0] == "race":
            words += ["--steps", "6", "--seeds", "1", "--grid", "3", "--tune-seeds", "1"]
        assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "my_optimizer.py").exists()
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    metaopt.optimizer("runs/lopt", [parameter]).step()
    assert (parameter != 1).all()


@pytest.mark.parametrize("command", ["plugins", "list", "meta-train", "race", "export", "demo"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"metaopt {command}" in capsys.readouterr().out.split("Example", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["race", "adamx"], "adamx"),
        (["race", "adamw", "--tasks", "digits"], "digits"),
        (["race", "adamw", "--device", "warp"], "device 'warp' is not to be had here"),
        (["export", "adamw", "--to", "a.py", "--set", "lr=-1"], "lr must be in [0, inf), got -1"),
        (["export", "adamw", "--to", "a.py", "--set", "lr"], "NAME=VALUE"),
        (["meta-train", "small_fc_lopt", "--task", "nope"], "nope"),
        (["meta-train", "small_fc_lopt", "--set-learned", "hidden=0"], "hidden must be an integer of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
