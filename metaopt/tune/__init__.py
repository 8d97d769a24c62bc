"""Outer problems over inner training runs: hyperparameters by search with Optuna (``metaopt tune``), and by gradient.

What needs Optuna is imported when first used (PEP 562), so that hypergradients need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metaopt.tune.derivatives import MissingGradient
from metaopt.tune.hypergradient import METHODS, Hypergradient, Method, hypergradient
from metaopt.tune.implicit import implicit
from metaopt.tune.inner import Hypers, Inner
from metaopt.tune.inverse import tolerances
from metaopt.tune.planner import Plan, plan

if TYPE_CHECKING:
    from metaopt.tune.priors import pruning_callback, sampler_for
    from metaopt.tune.tuning import TuneConfig

__all__ = [
    "METHODS",
    "Hypergradient",
    "Hypers",
    "Inner",
    "Method",
    "MissingGradient",
    "Plan",
    "TuneConfig",
    "hypergradient",
    "implicit",
    "plan",
    "pruning_callback",
    "sampler_for",
    "tolerances",
]

_HOMES = {"TuneConfig": "tuning", "pruning_callback": "priors", "sampler_for": "priors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'metaopt.tune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"metaopt.tune.{_HOMES[name]}"), name)
