"""docs/estimators.md has every estimator, and the numbers of the committed results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from toys import Linear

from metaopt import registry
from metaopt.meta.config import make_config
from metaopt.meta.trainer import meta_train

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


def test_the_estimator_of_the_page_is_unbiased_and_trains(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_estimator.py").write_text(text)
    reference = f"{tmp_path / 'my_estimator.py'}:OneWindowES"
    estimator = registry.create("estimator", reference, pairs=2000)
    theta = {"theta": torch.zeros(1, dtype=torch.float64)}
    carry = estimator.start(Linear(), theta, 0)
    gradient, carry, metrics = estimator.estimate(Linear(), theta, carry)
    # the mean of t over 20 steps; estimates are that times eps^2, whose deviation is sqrt 2
    assert gradient["theta"].item() == pytest.approx(10.5, abs=3 * 10.5 * 2**0.5 / 2000**0.5)
    assert metrics["inner_steps"] == 2 * 2000 * 20 and metrics["diverged"] == 0
    settings = {
        "learned": "learnable_adam",
        "estimator": reference,
        "estimator_options": {"pairs": 2},
        "outer_steps": 2,
    }
    result = meta_train(make_config(settings), tmp_path / "run", progress=False)
    assert len(result.metrics) == 2 and all(line["gradient_norm"] > 0 for line in result.metrics)


def test_an_estimator_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    settings = {"learned": "learnable_adam", "estimator": f"{tmp_path / 'mine.py'}:Mine", "outer_steps": 1}
    with pytest.raises(ValueError, match="gives a Mine, not a GradientEstimator"):
        meta_train(make_config(settings), tmp_path / "run", progress=False)
