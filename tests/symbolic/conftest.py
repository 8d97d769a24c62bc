"""Searches of tests tune their start for a moment only."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaopt_symbolic.baselines.NUMBER_CANDIDATES", 60)
