"""docs/bilevel-problems.md has code that runs, and the numbers of the committed results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import optuna
import pytest

from metaopt.tune.outer import OuterConfig, solve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bilevel-problems.md").read_text()


def test_the_table_is_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where it finds report.py
    results = json.loads((ROOT / "benchmarks" / "results" / "bilevel.json").read_text())
    made = runpy.run_path(str(ROOT / "benchmarks" / "bilevel.py"))["table"](results)
    assert made in PAGE, "print(table(results)) of benchmarks/bilevel.py"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names: dict[str, Any] = {"__name__": __name__}  # a module that there is, as dataclasses want
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for text in blocks:
        for usual, few in (("steps=60", "steps=2"), ("steps=30", "steps=2"), ("trials=20", "trials=2")):
            text = text.replace(usual, few)
        exec(text, names)
    assert len(blocks) == 4
    assert names["found"].grads["w"].tolist() == pytest.approx([-0.75, 0.0], abs=1e-2)  # decay = data / 2 = weights
    assert (names["best"] / "result.json").exists()
    result = solve(names["Denoise"](), OuterConfig(steps=8, lr=0.3))
    assert result.history[-1]["outer"] < result.history[0]["outer"]
