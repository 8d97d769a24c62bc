"""Tables of small learning problems: each example is an episode with a support set to learn from and a query set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.draws import uniform
from metaopt_tasks.data.load import load, moved


def _sine(x: Tensor, phase: Tensor) -> Tensor:
    return torch.sin(x - phase)


def _triangle(x: Tensor, phase: Tensor) -> Tensor:
    return (2 / math.pi) * torch.asin(torch.sin(x - phase))


def _bumps(x: Tensor, phase: Tensor) -> Tensor:
    return torch.exp(-((x - 3 * torch.cos(phase)) ** 2)) - torch.exp(-((x - 3 * torch.sin(phase)) ** 2))


CURVES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"sine": _sine, "triangle": _triangle, "bumps": _bumps}
"""Name -> function of x and a phase."""
_SIZES = {"train": 2000, "valid": 200, "test": 200}


def curve_episodes(
    device: Any = "cpu", curve: str = "sine", shots: int = 10, queries: int = 10, seed: int = 0
) -> dict[str, Split]:
    """Regression episodes: amplitude times a curve of random phase, seen at ``shots`` points in [-5, 5].

    For the sine as in Finn, Abbeel and Levine 2017 (arXiv:1703.03400): amplitude in [0.1, 5], phase in [0, pi]; inputs
    are divided by 5 / sqrt(3) and targets by the amplitudes' root mean square, so both are about standardised.

    Tensors: ``support_input`` [N, shots, 1], ``support_target`` [N, shots, 1], ``query_input``, ``query_target``
    [N, queries, 1].

    Args:
        device: of the tensors.
        curve: a name in `CURVES`.
        shots: points to learn from.
        queries: points to predict.
        seed: of everything.
    """
    require_choice("curve", curve, CURVES)
    return moved(_curve_episodes(curve, shots, queries, seed), device)


def class_episodes(
    device: Any = "cpu", source: str = "digits", ways: int = 5, shots: int = 1, queries: int = 4, seed: int = 0
) -> dict[str, Split]:
    """Classification episodes from a labelled source: ``ways`` of its classes in random order, some examples of each.

    The episodes of a part (train, valid, test) take their examples from that part of the source. All parts have the same
    classes, but a class has another number in each episode, so numbers cannot be learnt by heart.

    Tensors: ``support_input`` [N, ways shots, features], ``support_label`` int64 [N, ways shots], and ``query_input``,
    ``query_label`` with ``queries`` examples per class.

    Args:
        device: of the tensors.
        source: a registered data source with ``input`` and ``label``.
        ways: classes in an episode.
        shots: examples of a class to learn from.
        queries: examples of a class to predict.
        seed: of everything.
    """
    return moved(_class_episodes(source, ways, shots, queries, seed), device)


@cache
def _curve_episodes(curve: str, shots: int, queries: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    parts = {}
    for part, size in _SIZES.items():
        amplitude = 0.1 + 4.9 * uniform(generator, size, 1, 1)
        phase = math.pi * uniform(generator, size, 1, 1)
        x = 10 * uniform(generator, size, shots + queries, 1) - 5
        y = amplitude * CURVES[curve](x, phase) / math.sqrt((5**3 - 0.1**3) / (3 * 4.9))
        x = x * math.sqrt(3) / 5
        pieces = (*x.split([shots, queries], 1), *y.split([shots, queries], 1))
        names = ("support_input", "query_input", "support_target", "query_target")
        parts[part] = Split({name: piece.float().contiguous() for name, piece in zip(names, pieces, strict=True)})
    return parts


@cache
def _class_episodes(source: str, ways: int, shots: int, queries: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    return {
        part: _episodes_of(split, _SIZES[part] // 2, ways, shots, queries, generator)
        for part, split in load(source).items()
    }


def _episodes_of(split: Split, size: int, ways: int, shots: int, queries: int, generator: Generator) -> Split:
    inputs, label = split.tensors["input"].flatten(1), split.tensors["label"]
    members = [(label == c).nonzero().squeeze(1) for c in range(int(label.max()) + 1)]
    if len(members) < ways or min(map(len, members)) < shots + queries:
        raise ValueError(
            f"episodes need {ways} classes of {shots + queries} examples, got {len(members)} classes of at least "
            f"{min(map(len, members))}; take fewer ways, shots or queries"
        )
    rows = []
    for _ in range(size):
        for c in torch.randperm(len(members), generator=generator)[:ways]:
            order = torch.randperm(len(members[c]), generator=generator)
            rows.append(members[c][order[: shots + queries]])
    taken = inputs[torch.stack(rows).reshape(size, ways, shots + queries)]
    support, query = taken.split([shots, queries], 2)
    way = torch.arange(ways)
    return Split({
        "support_input": support.flatten(1, 2).contiguous(), "query_input": query.flatten(1, 2).contiguous(),
        "support_label": way.repeat_interleave(shots).expand(size, -1).contiguous(),
        "query_label": way.repeat_interleave(queries).expand(size, -1).contiguous(),
    })  # fmt: skip
