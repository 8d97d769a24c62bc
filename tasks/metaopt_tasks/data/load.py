"""How a task gets its data: by the name of any registered source."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt import registry
from metaopt.random import hash64
from metaopt.task import Split

TRAIN_SHARE, VALID_SHARE = 0.70, 0.15


def load(source: str, device: Any = "cpu", **arguments: Any) -> dict[str, Split]:
    """``{"train": Split, "valid": Split, "test": Split}`` of a registered data source or of ``file.py:function``.

    A function of the user's own need not take ``device``: what it gives is moved there.
    """
    takes = inspect.signature(registry.load("data_source", source)).parameters
    if "device" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return registry.create("data_source", source, device=device, **arguments)
    return moved(registry.create("data_source", source, **arguments), device)


def package_folder(package: str) -> Path:
    """Where an installed package lies; it is not imported, which takes scikit-learn a second.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"data come with {package}, which is not installed; pip install it", name=package)
    return Path(spec.origin).parent


def classes_of(data: dict[str, Split]) -> int:
    """Number of classes of labelled data."""
    return int(data["train"].tensors["label"].max()) + 1


def split_rows(tensors: dict[str, Tensor], label: Tensor | None = None, seed: int = 0) -> dict[str, Split]:
    """Cut examples [N, ...] in the order of a fixed hash of their row numbers: 70 % train, 15 % valid, the rest test.

    Args:
        tensors: of one length N.
        label: int64 [N] classes; each is cut by itself (stratified).
        seed: of the hash.
    """
    size = len(next(iter(tensors.values())))
    order = hash64(torch.arange(size) + seed).argsort()
    groups = [order] if label is None else [order[label[order] == c] for c in range(int(label.max()) + 1)]
    rows: dict[str, list[Tensor]] = {"train": [], "valid": [], "test": []}
    for members in groups:
        ends = [round(TRAIN_SHARE * len(members)), round((TRAIN_SHARE + VALID_SHARE) * len(members))]
        for part, piece in zip(rows.values(), members.tensor_split(ends), strict=True):
            part.append(piece)
    taken = {name: torch.cat(pieces) for name, pieces in rows.items()}
    return {name: Split({key: t[index] for key, t in tensors.items()}) for name, index in taken.items()}


def standardized(data: dict[str, Split], key: str, per_feature: bool = False) -> dict[str, Split]:
    """``key`` shifted and scaled by the mean and standard deviation of the train part: of each feature, or of all."""
    train = data["train"].tensors[key].double()
    over = 0 if per_feature else tuple(range(train.dim()))
    mean, std = train.mean(over), train.std(over).clamp_min(1e-8)
    return {
        name: Split(split.tensors | {key: ((split.tensors[key].double() - mean) / std).float()})
        for name, split in data.items()
    }


def moved(data: dict[str, Split], device: Any) -> dict[str, Split]:
    """The same data on ``device``."""
    return {name: split.to(device) for name, split in data.items()}
