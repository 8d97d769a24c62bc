"""docs/tune.md has the numbers of the committed results."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_table_is_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where it finds report.py
    results = json.loads((ROOT / "benchmarks" / "results" / "tune.json").read_text())
    made = runpy.run_path(str(ROOT / "benchmarks" / "tune.py"))["table"](results)
    assert made in (ROOT / "docs" / "tune.md").read_text(), "print(table(results)) of benchmarks/tune.py"
