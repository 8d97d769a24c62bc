"""Procedural tables for linear models: sparse truths, and designs that are hard to descend.

Made in float64 on the CPU from a seed, cut as `metaopt_tasks.data.load.split_rows` does, standardised by feature.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.data.draws import categorical, normal, uniform
from metaopt_tasks.data.load import moved, split_rows, standardized


def sparse_regression(
    device: Any = "cpu",
    rows: int = 600,
    features: int = 100,
    informative: int = 10,
    noise: float = 0.1,
    correlation: float = 0.0,
    seed: int = 0,
) -> dict[str, Split]:
    """``target`` [N, 1] depends on ``informative`` of the ``input`` [N, features] columns (`sparse_weights`), plus noise.

    Args:
        device: of the data.
        rows: examples in all parts together.
        features: columns.
        informative: columns that matter.
        noise: standard deviation, in that of the noise-free target.
        correlation: of neighbouring columns, in [0, 1); those i apart have its i-th power.
        seed: of all random numbers.
    """
    if not 1 <= informative <= features:
        raise ValueError(f"informative must be in [1, features = {features}], got {informative}")
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation must be in [0, 1), got {correlation}")
    return moved(_sparse_regression(rows, features, informative, noise, correlation, seed), device)


def sparse_weights(features: int, informative: int, seed: int = 0) -> Tensor:
    """The truth of `sparse_regression`, float64 [features]: magnitudes in [0.5, 1.5] and random signs, elsewhere 0."""
    generator = Generator().manual_seed(seed)
    chosen = torch.randperm(features, generator=generator)[:informative]
    sizes = 0.5 + uniform(generator, informative)
    signs = torch.randint(2, (informative,), generator=generator) * 2 - 1
    return torch.zeros(features, dtype=torch.float64).index_put((chosen,), sizes * signs)


@cache
def _sparse_regression(
    rows: int, features: int, informative: int, noise: float, correlation: float, seed: int
) -> dict[str, Split]:
    generator = Generator().manual_seed(seed + 1)
    fresh = normal(generator, rows, features)
    columns = [fresh[:, 0]]
    for i in range(1, features):  # an autoregressive process over the columns
        columns.append(correlation * columns[-1] + math.sqrt(1 - correlation**2) * fresh[:, i])
    inputs = torch.stack(columns, 1)
    clean = inputs @ sparse_weights(features, informative, seed)
    return _table(inputs, clean, noise, generator)


def ill_conditioned_regression(
    device: Any = "cpu", rows: int = 600, features: int = 30, condition: float = 1e4, noise: float = 0.1, seed: int = 0
) -> dict[str, Split]:
    """``target`` [N, 1] is linear in ``input`` [N, features], plus noise; the columns are nearly dependent.

    Before standardising, the covariance has eigenvalues from 1 to ``condition``, log-spaced, and random eigenvectors.
    Every direction matters alike for the target, so the flat ones must be learned too.

    Args:
        device: of the data.
        rows: examples in all parts together.
        features: columns.
        condition: of the covariance.
        noise: standard deviation, in that of the noise-free target.
        seed: of all random numbers.
    """
    return moved(_ill_conditioned_regression(rows, features, condition, noise, seed), device)


@cache
def _ill_conditioned_regression(
    rows: int, features: int, condition: float, noise: float, seed: int
) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    hidden, inputs = _ill_conditioned(rows, features, condition, generator)
    clean = hidden @ normal(generator, features)
    return _table(inputs, clean, noise, generator)


def ill_conditioned_classes(
    device: Any = "cpu", rows: int = 600, features: int = 20, condition: float = 1e3, classes: int = 4, seed: int = 0
) -> dict[str, Split]:
    """``label`` [N] is drawn from a linear softmax of ``input`` [N, features], made as in `ill_conditioned_regression`."""
    return moved(_ill_conditioned_classes(rows, features, condition, classes, seed), device)


@cache
def _ill_conditioned_classes(rows: int, features: int, condition: float, classes: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    hidden, inputs = _ill_conditioned(rows, features, condition, generator)
    logits = hidden @ normal(generator, features, classes)
    label = categorical(generator, logits)
    return standardized(split_rows({"input": inputs, "label": label}, label), "input", per_feature=True)


def _ill_conditioned(rows: int, features: int, condition: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Independent standard normal columns, and the same stretched and rotated; float64 [rows, features] each."""
    hidden = normal(generator, rows, features)
    turn, _ = torch.linalg.qr(normal(generator, features, features))
    spread = condition ** (0.5 * torch.linspace(0, 1, features, dtype=torch.float64))
    return hidden, (hidden * spread) @ turn


def _table(inputs: Tensor, clean: Tensor, noise: float, generator: Generator) -> dict[str, Split]:
    noisy = clean + noise * clean.std() * normal(generator, len(clean))
    data = split_rows({"input": inputs, "target": noisy[:, None]})
    return standardized(standardized(data, "input", per_feature=True), "target", per_feature=True)
