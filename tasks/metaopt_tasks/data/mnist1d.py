"""MNIST-1D (Greydanus and Kobak 2020, arXiv:2011.14439): ten curves, shifted, stretched, sheared and buried in noise.

Numbers are the paper's; the random draws are ours, so examples differ from those of its own file.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.data.draws import normal, uniform
from metaopt_tasks.data.load import moved, standardized

_TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_PADDING = (36, 60)
_LENGTH = 12 + _PADDING[1]  # before the last resampling
_SCALE, _SHEAR, _SHIFT = 0.4, 0.75, 48
_CORRELATED_NOISE, _NOISE, _SMOOTHING = 0.25, 0.02, 2.0
_FINAL_LENGTH = 40
_SIZES = {"train": 4000, "valid": 500, "test": 500}


def mnist1d(device: Any = "cpu", seed: int = 42) -> dict[str, Split]:
    """5,000 one-dimensional digits: ``input`` [N, 1, 40] and ``label`` [N]; 4,000, 500 and 500 of them.

    Args:
        device: where the data live.
        seed: of everything random.
    """
    return moved(_mnist1d(seed), device)


def templates() -> Tensor:
    """The ten curves [10, 12], float64: of unit variance over 6, starting at 0."""
    curves = torch.tensor(_TEMPLATES, dtype=torch.float64)
    curves = curves / curves.std(1, correction=0, keepdim=True)
    return (curves - curves[:, :1]) / 6


@cache
def _mnist1d(seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    size = sum(_SIZES.values())
    label = torch.arange(10).repeat(size // 10)  # so that splits that are whole multiples of ten are balanced
    inputs = _examples(templates()[label], generator)
    parts = zip(inputs.split(list(_SIZES.values())), label.split(list(_SIZES.values())), strict=True)
    data = {name: Split({"input": x[:, None], "label": y}) for name, (x, y) in zip(_SIZES, parts, strict=True)}
    return standardized(data, "input")


def _examples(curves: Tensor, generator: Generator) -> Tensor:
    """One noisy signal [N, 40] for each curve [N, 12]."""
    from scipy.ndimage import gaussian_filter1d

    def share() -> Tensor:
        return uniform(generator, len(curves), 1)

    def noise() -> Tensor:
        return normal(generator, len(curves), _LENGTH)

    low, high = _PADDING
    padding = low + (share() * (high - low + 1)).floor()
    # zeros are appended, and the whole is stretched to one length
    place = torch.linspace(0, 1, _LENGTH, dtype=torch.float64) * (11 + padding)
    signal = _interpolate(torch.cat([curves, curves.new_zeros(len(curves), high)], 1), place)
    signal = signal * (1 + _SCALE * (share() - 0.5))
    shift = (share() * _SHIFT).long()
    source = (torch.arange(_LENGTH) - shift) % _LENGTH
    signal, drawn = signal.gather(1, source), (place < 12).gather(1, source)
    # signals that are no curve are smooth noise, and all get a little white noise
    smooth = torch.from_numpy(gaussian_filter1d((_CORRELATED_NOISE * noise()).numpy(), _SMOOTHING, axis=1))
    signal = torch.where(drawn, signal, smooth) + _NOISE * noise()
    signal = signal - _SHEAR * (share() - 0.5) * torch.linspace(-0.5, 0.5, _LENGTH, dtype=torch.float64)
    last = torch.linspace(0, _LENGTH - 1, _FINAL_LENGTH, dtype=torch.float64)
    return _interpolate(signal, last.expand(len(signal), -1))


def _interpolate(values: Tensor, place: Tensor) -> Tensor:
    """``values`` [N, M] at fractional indices ``place`` [N, L], linearly."""
    left = place.floor().long().clamp_max(values.shape[1] - 2)
    share = place - left
    return values.gather(1, left) * (1 - share) + values.gather(1, left + 1) * share
