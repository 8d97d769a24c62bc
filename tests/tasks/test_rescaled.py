"""Runs of one task in different units go together, each as it would go alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from metaopt import registry
from metaopt.task import stack_configs
from metaopt.unroll import start, unroll
from metaopt_classic.sgd import SGD
from metaopt_tasks.augment import Reparametrized
from metaopt_tasks.rescaled import Rescaled, RescaledFamily


def test_scales_are_log_uniform() -> None:
    family = RescaledFamily("quadratic_20", low=1e-3, high=1e3)
    scales = [math.log(family.sample(torch.Generator().manual_seed(seed)).scale) for seed in range(300)]
    assert stats.kstest(scales, stats.uniform(math.log(1e-3), 2 * math.log(1e3)).cdf).pvalue > 0.01


def test_stacked_members_train_as_each_does_alone_and_as_the_reparametrized_task() -> None:
    inside = registry.create("task", "iris_mlp")
    members = [Rescaled(inside, 0.5), Rescaled(inside, 3.0)]
    rule, seeds = SGD(lr=0.05), torch.tensor([4, 5])
    with torch.no_grad():
        together, _ = unroll(members[0], rule, start(members[0], rule, seeds, config=stack_configs(members)), 5)
        for k, member in enumerate(members):
            twin = Reparametrized(inside, "global", low=member.scale, high=member.scale)
            for one in (member, twin):
                alone, _ = unroll(one, rule, start(one, rule, seeds[k : k + 1]), 5)
                torch.testing.assert_close(together[k], alone[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_a_family_inside_and_impossible_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="task must name one task, got 'mlp_classifier', a family"):
        registry.create("task", "rescaled", task="mlp_classifier")
    with pytest.raises(ValueError, match="low and high must be 0 < low <= high, got 0 and 1000"):
        RescaledFamily(low=0)
