"""Learned optimizers become better ones when their meta-gradient is followed."""

from __future__ import annotations

import pytest
import torch
from rule_strategies import Bowl
from torch import Tensor

from metaopt import registry
from metaopt.learned import LearnedRule
from metaopt.unroll import start, unroll


@pytest.mark.parametrize(
    ("name", "ratio"), [("coordinate_lstm", 0.75), ("l2o_pa", 0.85), ("residual_mlp", 0.95), ("learned_schedule", 0.97)]
)
def test_meta_training_by_backpropagation_lowers_the_loss(name: str, ratio: float) -> None:
    """Ten steps of Adam on theta through 8 steps of 3 runs on a bowl; what was reached when this was written, and slack."""
    learned: LearnedRule = registry.create("learned_optimizer", name)
    theta = {key: v.requires_grad_() for key, v in learned.init_theta(torch.Generator().manual_seed(0)).items()}
    outer = torch.optim.Adam(theta.values(), lr=0.2 if name == "learned_schedule" else 0.01)
    task = Bowl()

    def loss() -> Tensor:
        rule = learned.bind(theta)
        losses, _ = unroll(task, rule, start(task, rule, [0, 1, 2]), 8, horizon=8)
        return losses.mean()

    before = loss().item()
    for _ in range(10):
        outer.zero_grad()
        loss().backward()
        outer.step()
    assert loss().item() < ratio * before
