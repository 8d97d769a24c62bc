"""Checkpoints of meta-training that any number of processes can write, and any other number read."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metaopt import tree
from metaopt.files import write_atomic
from metaopt.meta.shard import ALONE, Shard


def save_checkpoint(path: Path, content: dict[str, Any], shard: Shard = ALONE) -> None:
    """Write ``content`` with the copies of all processes; collective.

    Args:
        path: of the file; rank 0 writes it, the others do not look at it.
        content: nested dicts of tensors, numbers, text and lists, the same on every process except below each key
            "copies" (of an estimator's carry, at any depth), where leaves [n_own, ...] are this process's.
        shard: of this process.
    """
    whole = _map_copies(lambda copies: _gather(copies, shard), content)
    if shard.rank == 0:
        file = io.BytesIO()  # a file's own name would become part of its bytes
        torch.save(whole, file)
        write_atomic(path, file.getvalue())


def load_checkpoint(path: Path, shard: Shard = ALONE) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, on the CPU, with this process's copies; None where there is no file; collective.

    Rank 0 reads the file and sends it to the others, so the processes need no common file system.

    Raises:
        ValueError: the file is no checkpoint.
    """
    data = shard.broadcast(path.read_bytes() if shard.rank == 0 and path.exists() else None)
    if data is None:
        return None
    try:
        whole = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint; delete it to begin the run again ({error})") from error
    content: dict[str, Any] = _map_copies(
        lambda copies: tree.map_tree(lambda leaf: leaf[shard.own(len(leaf))], copies), whole
    )
    return content


def _gather(copies: tree.Tree, shard: Shard) -> tree.Tree:
    own = next(tree.leaves(copies), None)
    if own is None:
        return copies
    return shard.gather(copies, int(shard.sum(torch.tensor(len(own)))))


def _map_copies(function: Callable[[tree.Tree], tree.Tree], content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: function(value) if key == "copies" else _map_copies(function, value) for key, value in content.items()}
