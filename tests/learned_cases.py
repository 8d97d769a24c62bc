"""Meta-parameters and tensors that the tests of learned rules start from."""

from __future__ import annotations

import torch

from metaopt.learned import LearnedRule, Theta
from metaopt.rule import Params


def noisy_theta(learned: LearnedRule, deviation: float) -> Theta:
    """Fresh meta-parameters plus normal noise, so that what starts at zero counts; float64."""
    generator = torch.Generator().manual_seed(0)
    theta = learned.init_theta(generator)
    return {
        name: value.double() + deviation * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in theta.items()
    }


def values(seed: int, shapes: dict[str, tuple[int, ...]], planes: tuple[int, ...] = ()) -> Params:
    """Normal numbers [*planes, *shape] of each name, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn((*planes, *s), generator=generator, dtype=torch.float64) for n, s in shapes.items()}
