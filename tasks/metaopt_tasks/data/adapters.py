"""Data that you bring: any map-style ``torch.utils.data.Dataset``, torchvision's and Hugging Face's, read once and kept.

Nothing is downloaded unless asked for. A data set with a source of its own is a function in a file of yours::

    def letters(device="cpu"):                       # letters.py; then data = "letters.py:letters" in any task
        return from_dataset(MyLetters("path"), device=device)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.task import Split
from metaopt_tasks.data.load import moved, split_rows, standardized

_SPLITS = ("train", "valid", "test")


def from_dataset(
    dataset: Any,
    *,
    input: int | str = 0,
    target: int | str = 1,
    standardize: bool = True,
    limit: int | None = None,
    seed: int = 0,
    device: Any = "cpu",
) -> dict[str, Split]:
    """The whole of a data set on the device: ``input`` float32 [N, ...] with ``label`` int64 [N] or ``target`` float32.

    Whole-number targets of one element are labels; others are regression targets [N, outputs]. Images of PIL or numpy in
    bytes (H, W) or (H, W, C) become (C, H, W) in [0, 1].

    Args:
        dataset: has ``len`` and ``[i]``, or a mapping ``{"train": ..., "valid": ..., "test": ...}`` of such. What is missing
            is cut from train by a fixed hash: 15 % each, or of a single data set 70 % train, 15 % valid and 15 % test.
        input: where an example holds its input: an index, or a key.
        target: likewise its label or target.
        standardize: shift and scale inputs by the train part's mean and standard deviation: of each feature of a table
            [N, features], of all together for any other shape.
        limit: at most so many examples of each given split, its first.
        seed: of the hash.
        device: where the data live.
    """
    given = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    if "train" not in given or not set(given) <= set(_SPLITS):
        raise ValueError(f"the splits must be train and perhaps valid and test, got {sorted(given)}; rename them")
    parts = {name: _read(part, input, target, limit) for name, part in given.items()}
    return moved(_finished(parts, standardize, seed), device)


def torchvision(
    dataset: str,
    device: Any = "cpu",
    root: str = "data",
    download: bool = False,
    limit: int | None = None,
) -> dict[str, Split]:
    """A torchvision classification data set with a ``train`` argument, such as ``MNIST``, ``FashionMNIST`` or ``CIFAR10``.

    Args:
        dataset: name of a class in ``torchvision.datasets``.
        device: where the data live.
        root: folder that holds the data set.
        download: fetch it if it is not there.
        limit: at most so many examples of each split.
    """
    import torchvision.datasets as available

    if not hasattr(available, dataset):
        raise ValueError(f"dataset must be a class of torchvision.datasets, such as CIFAR10, got {dataset!r}")
    build = getattr(available, dataset)
    parts = {"train": build(root, train=True, download=download), "test": build(root, train=False, download=download)}
    return from_dataset(parts, limit=limit, device=device)


def huggingface(
    dataset: Any,
    device: Any = "cpu",
    input: str = "image",
    target: str = "label",
    limit: int | None = None,
    **arguments: Any,
) -> dict[str, Split]:
    """A Hugging Face data set; its ``validation`` split counts as valid, and splits of other names are left out.

    Args:
        dataset: a name or path for ``datasets.load_dataset``, which may download it, or a loaded ``Dataset`` or
            ``DatasetDict``.
        device: where the data live.
        input: column.
        target: column.
        limit: at most so many examples of each split.
        **arguments: for ``datasets.load_dataset``, such as ``split="train"``.
    """
    if isinstance(dataset, str):
        from datasets import load_dataset

        dataset = load_dataset(dataset, **arguments)
    if isinstance(dataset, Mapping):
        renamed = {"validation" if name == "valid" else name: part for name, part in dataset.items()}
        dataset = {
            name: renamed[theirs]
            for name, theirs in (("train", "train"), ("valid", "validation"), ("test", "test"))
            if theirs in renamed
        }
    return from_dataset(dataset, input=input, target=target, limit=limit, device=device)


def _read(dataset: Any, input: int | str, target: int | str, limit: int | None) -> dict[str, Tensor]:
    size = len(dataset) if limit is None else min(limit, len(dataset))
    if size == 0:
        raise ValueError("a split must have at least one example, got none; leave it out of the mapping")
    examples = [dataset[i] for i in range(size)]
    inputs = torch.stack([_tensor(example[input]) for example in examples])
    targets = torch.stack([torch.as_tensor(example[target]) for example in examples])
    if targets.is_floating_point():
        return {"input": inputs, "target": targets.float().reshape(size, -1)}
    if targets.numel() != size:
        raise ValueError(
            f"labels must be single whole numbers, got shape {tuple(targets.shape[1:])}; give floats to regress"
        )
    return {"input": inputs, "label": targets.long().reshape(size)}


def _tensor(value: Any) -> Tensor:
    """One input, float32; images in bytes become (C, H, W) in [0, 1]."""
    if isinstance(value, Tensor):
        return value.float() / (255 if value.dtype == torch.uint8 else 1)
    if isinstance(value, (int, float, Sequence)):
        return torch.tensor(value, dtype=torch.float32)
    import numpy as np

    array = torch.from_numpy(np.array(value))  # a copy: PIL's and numpy's arrays may be read-only
    if array.dtype != torch.uint8 or array.dim() not in (2, 3):
        return array.float()
    image = array[..., None] if array.dim() == 2 else array
    return image.permute(2, 0, 1).float() / 255


def _finished(parts: dict[str, dict[str, Tensor]], standardize: bool, seed: int) -> dict[str, Split]:
    missing = [name for name in _SPLITS if name not in parts]
    data = {name: Split(tensors) for name, tensors in parts.items()}
    if missing:
        cut = split_rows(parts["train"], parts["train"].get("label"), seed)
        if len(missing) == 1:  # what would have been the other held-out part trains
            (kept,) = (name for name in ("valid", "test") if name not in missing)
            joined = {key: torch.cat([cut["train"].tensors[key], cut[kept].tensors[key]]) for key in parts["train"]}
            cut["train"] = Split(joined)
        data |= {name: cut[name] for name in ("train", *missing)}
    table = parts["train"]["input"].dim() == 2
    return standardized(data, "input", per_feature=table) if standardize else data
