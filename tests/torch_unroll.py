"""The unroll that kernels are held against."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import Tensor

from metaopt.rule import UpdateRule
from metaopt.task import Task
from metaopt.unroll import Carry, unroll


def unrolled_by_torch(task: Task, rule: UpdateRule, carry: Carry, steps: int, **options: Any) -> tuple[Tensor, Carry]:
    """Back-end ``eager`` by torch operations alone, of which on a CPU kernels would take a part."""
    module = sys.modules["metaopt.unroll"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernels_of", lambda _: None)
        patch.setattr(module, "_ADVANCES", {})
        return unroll(task, rule, carry, steps, backend="eager", **options)
