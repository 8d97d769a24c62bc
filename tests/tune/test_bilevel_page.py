"""docs/bilevel.md has every method, code that runs, and the numbers of the committed results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from metaopt.tune import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bilevel.md").read_text()


def test_every_method_has_a_row() -> None:
    first_table = PAGE[PAGE.index("| method |") : PAGE.index('`method="auto"`')]
    rows = re.findall(r"^\| (`[^|]*) \|", first_table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(METHODS)


def test_the_tables_are_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where it finds report.py
    results = json.loads((ROOT / "benchmarks" / "results" / "hypergradient.json").read_text())
    for table in runpy.run_path(str(ROOT / "benchmarks" / "hypergradient.py"))["tables"](results).values():
        assert table in PAGE, "run python benchmarks/hypergradient.py"


def test_the_code_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    for text in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        exec(text, names)
    assert names["found"].diagnostics["method"] == "unroll"
