"""The examples of docs/llm.md, docs/llm-safety.md, docs/losses.md and docs/distill.md run as they are written."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import completion
from safetensors.torch import save_file

from metaopt.cli import main
from metaopt.objective import Objective
from metaopt.registry import create
from metaopt_llm import servers
from metaopt_llm.sandbox import Level, probe
from metaopt_symbolic.losses import judge
from metaopt_symbolic.losses.judge import Regime, Stage

DOCS = Path(__file__).parents[2] / "docs"
TINY = (Stage((Regime("noisy", {"data": "preferences_noisy"}),), 2, (0,)),)


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def answered(monkeypatch: pytest.MonkeyPatch, source: str) -> list[str]:
    """Every server answers with a candidate, the k-th one with k in place of K; the models that were asked."""
    asked: list[str] = []

    def post(url: str, body: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        asked.append(body["model"])
        k = len(asked)
        candidate = {"thought": "why not", "name": f"found_{k}", "source": source.replace("K", str(k))}
        return dict(json.loads(completion(json.dumps(candidate))))

    monkeypatch.setattr(servers, "post_json", post)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none-of-yours")
    return asked


def test_proposers_are_asked_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = answered(monkeypatch, "def rule(param, grad, *, lr, t):\n    return param - K * lr * grad")
    namespace: dict[str, Any] = {}
    one, several = examples("llm.md")
    exec(one, namespace)
    assert "found_1 why not def rule(" in capsys.readouterr().out
    assert namespace["found"].cost == pytest.approx(100 * 0.25e-6 + 20 * 2e-6)
    exec(several, namespace)
    assert namespace["proposal"].source.count("- 2 * lr") == 1 and namespace["score"] < 1
    assert asked == ["gpt-5-mini", namespace["proposal"].proposer]
    told = namespace["mixture"].bandit.state()
    assert {name: arm["told"] for name, arm in told.items()} == {"gpt-5-nano": 0, "gpt-5": 0} | {asked[1]: 1}
    namespace["ledger"].close()
    assert len((tmp_path / "runs" / "llm" / "ledger.jsonl").read_text().splitlines()) == 2 * len(asked), (
        "asked, answered"
    )


def test_texts_become_losses_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    text, statements, _ = examples("llm-safety.md")
    exec(text, {})
    assert capsys.readouterr().out.startswith("tensor([0.")  # near log 2
    exec(statements, {})
    assert "outputs=('loss',)" in capsys.readouterr().out


@pytest.mark.skipif(probe() < Level.NAMESPACES, reason="candidates are confined by limits alone on this machine")
def test_free_python_runs_as_the_page_says() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(examples("llm-safety.md")[2], namespace)
    rho = namespace["rho"]
    torch.testing.assert_close(rho.grad, -0.1 * torch.exp(-0.1 * rho.detach()) / 4)


def test_a_drift_of_ones_own_is_loaded_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own, found = examples("distill.md")
    weights = {"first": torch.randn(16, 8), "last": torch.randn(16)}
    save_file(weights, tmp_path / "drift.safetensors")
    (tmp_path / "my_drift.py").write_text(own)
    drift: Any = create("objective", "my_drift.py:learned")
    assert isinstance(drift, Objective)
    torch.testing.assert_close(drift.first, weights["first"], check_dtype=False)
    ua, va = torch.linspace(-3, 3, 50), torch.linspace(-1, 1, 50)
    namespace: dict[str, Any] = {"torch": torch, "ua": ua, "va": va}
    exec(found, namespace)
    torch.testing.assert_close(namespace["x4"], ua - 2 * torch.tanh(ua / 2))
    # numbers of two digits: 1.7 for 1 / 0.6
    torch.testing.assert_close(namespace["x8"], va - 0.6 * torch.tanh(va / 0.6), atol=0.02, rtol=0)


def test_the_searches_of_the_page_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller budget."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "search_stages", lambda: TINY)
    monkeypatch.setattr(judge, "selection_stage", lambda: TINY[0])
    asked = answered(monkeypatch, "def loss(rho, beta):\n    return F.softplus(K.5 - beta * rho)")
    page = (DOCS / "losses.md").read_text().replace("\\\n", "")
    commands = [
        shlex.split(line)[1:] for line in re.findall(r"^metaopt (?:discover loss|show) .*$", page, re.MULTILINE)
    ]
    assert [command[0] for command in commands] == ["discover", "show", "discover", "discover"]
    (tmp_path / "prompts").mkdir()
    (prompt,) = re.findall(r"^echo '(.*)' > (prompts/propose.txt)$", page, re.MULTILINE)
    (tmp_path / prompt[1]).write_text(prompt[0])
    for k, command in enumerate(commands):
        smaller = (
            ["--budget", "2", "--batch", "2", "--out", f"search_{k}"]
            if command[0] == "discover"
            else ["--from", "search_0"]
        )
        assert main([*command, *smaller]) == 0
    assert asked.count("gpt-5-mini") == len(asked) > 2
    assert all((tmp_path / f"search_{k}" / "champion.py").is_file() for k in (0, 2, 3))
