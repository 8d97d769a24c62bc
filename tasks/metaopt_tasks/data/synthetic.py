"""Made-up classification and regression data: Gaussian mixtures, curves in the plane and teacher networks."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Generator

from metaopt.task import Split
from metaopt_tasks.data.draws import normal, uniform
from metaopt_tasks.data.load import moved, split_rows, standardized


def mixtures(
    device: Any = "cpu",
    dims: int = 8,
    classes: int = 5,
    components: int = 2,
    separation: float = 3.0,
    size: int = 3000,
    seed: int = 0,
) -> dict[str, Split]:
    """Classes that are mixtures of Gaussians: ``input`` [size, dims], standardised by feature, and ``label`` [size].

    Means are normal with standard deviation ``separation`` / sqrt(dims), so that typical distances do not depend on
    dims; a component's covariance is G' G / dims with G a standard normal matrix.

    Args:
        device: where the data live.
        dims: number of features.
        classes: all of one size.
        components: Gaussians of each class.
        separation: of the means.
        size: number of examples, a multiple of classes times components.
        seed: of everything random.
    """
    if size % (classes * components):
        raise ValueError(f"size must be a multiple of classes times components, {classes * components}, got {size}")
    return moved(_mixtures(dims, classes, components, separation, size, seed), device)


def spirals(
    device: Any = "cpu", classes: int = 3, noise: float = 0.1, size: int = 3000, seed: int = 0
) -> dict[str, Split]:
    """Interleaved spiral arms, one a class, each turning once: ``input`` [size, 2] and ``label`` [size].

    Args:
        device: where the data live.
        classes: number of arms.
        noise: standard deviation in the plane; the arms reach radius 2.
        size: number of examples, a multiple of classes.
        seed: of everything random.
    """
    _require_multiple(size, classes)
    return moved(_curves("spirals", classes, noise, size, seed), device)


def rings(
    device: Any = "cpu", classes: int = 3, noise: float = 0.1, size: int = 3000, seed: int = 0
) -> dict[str, Split]:
    """Concentric circles of radius 1 / classes, 2 / classes, ... times 2, one a class; arguments as for `spirals`."""
    _require_multiple(size, classes)
    return moved(_curves("rings", classes, noise, size, seed), device)


def teacher(
    device: Any = "cpu",
    dims: int = 16,
    width: int = 8,
    outputs: int = 1,
    noise: float = 0.1,
    size: int = 4000,
    seed: int = 0,
) -> dict[str, Split]:
    """What a random two-layer tanh network says, plus noise: ``input`` [size, dims] and ``target`` [size, outputs].

    y = A tanh(2 W x + b) with W of variance 1 / dims and standard normal A, b, x. The target is standardised after noise
    of ``noise`` times its standard deviation was added.

    Args:
        device: where the data live.
        dims: number of features.
        width: of the teacher's hidden layer.
        outputs: number of targets.
        noise: relative to the noiseless target.
        size: number of examples.
        seed: of everything random.
    """
    return moved(_teacher(dims, width, outputs, noise, size, seed), device)


def _require_multiple(size: int, classes: int) -> None:
    if size % classes:
        raise ValueError(f"size must be a multiple of the {classes} classes, got {size}")


@cache
def _mixtures(dims: int, classes: int, components: int, separation: float, size: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    groups = classes * components
    means = normal(generator, groups, 1, dims) * separation / math.sqrt(dims)
    factors = normal(generator, groups, dims, dims) / math.sqrt(dims)
    points = means + normal(generator, groups, size // groups, dims) @ factors
    label = torch.arange(classes).repeat_interleave(components * (size // groups))
    return standardized(
        split_rows({"input": points.reshape(size, dims), "label": label}, label), "input", per_feature=True
    )


@cache
def _curves(kind: str, classes: int, noise: float, size: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(size // classes)
    share = uniform(generator, size)
    if kind == "spirals":
        radius, angle = 0.2 + 1.8 * share, 2 * math.pi * (share + label / classes)
    else:
        radius, angle = 2 * (label + 1.0) / classes, 2 * math.pi * share
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + noise * normal(generator, size, 2)
    return standardized(split_rows({"input": points, "label": label}, label), "input", per_feature=True)


@cache
def _teacher(dims: int, width: int, outputs: int, noise: float, size: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    inputs = normal(generator, size, dims)
    hidden = torch.tanh(inputs @ (2 * normal(generator, dims, width) / math.sqrt(dims)) + normal(generator, width))
    clean = hidden @ normal(generator, width, outputs)
    target = clean + noise * clean.std(0) * normal(generator, size, outputs)
    data = split_rows({"input": inputs, "target": target})
    return standardized(standardized(data, "input", per_feature=True), "target", per_feature=True)
