"""docs/estimators.md has every estimator, and the numbers of the committed results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from metaopt import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "estimators.md").read_text()


def test_every_estimator_has_a_row_with_its_formula() -> None:
    first_table = PAGE[: PAGE.index("*Smoothing*")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", first_table, re.MULTILINE)) == sorted(registry.specs("estimator"))


def test_the_tables_are_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where it finds report.py
    results = json.loads((ROOT / "benchmarks" / "results" / "estimators.json").read_text())
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "estimators.py"))
    assert benchmark["tables"](results) in PAGE, "run python benchmarks/estimators.py"
