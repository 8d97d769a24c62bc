"""Meta-parameters that were trained with the JAX originals, read from their checkpoints without JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.learned import BoundRule

SIZES: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "small_fc_lopt": {"hidden": ("w1", 0)},
    "mulo": {"hidden": ("w1", 0)},
    "mlp_lopt": {"hidden": ("w1", 0)},
    "mlp_nominal": {"hidden": ("w1", 0)},
    "celo2_base": {"hidden": ("w1", 0)},
    "celo2": {"hidden": ("w1", 0)},
    "velo": {"hidden": ("mlp.w1", 1), "lstm_hidden": ("lstm.hidden", 0), "bank": ("mlp.w1", 0)},
    "celo": {"hidden": ("mlp.w1", 0), "lstm_hidden": ("lstm.hidden", 0)},
    "celo_adam": {"lstm_hidden": ("lstm.hidden", 0)},
    "rnn_mlp_lopt": {"hidden": ("mlp.w1", 0), "lstm_hidden": ("lstm.hidden", 0)},
    "nn_adam": {"lstm_hidden": ("lstm.hidden", 0)},
}
"""Learned optimizer -> its options that follow from the shapes: tensor and axis."""

_NDARRAY, _SCALAR = 1, 3  # flax's codes of msgpack extensions
_FLOATS = {b"float16": torch.float16, b"bfloat16": torch.bfloat16, b"float32": torch.float32, b"float64": torch.float64}
_DEEPEST = 16


def import_flax(path: Path | str, name: str, **options: Any) -> BoundRule:
    """A learned rule bound to the meta-parameters of a checkpoint of learned_optimization or celo.

    Args:
        path: written by ``flax.serialization``: a dict of arrays, or one that has it under ``params``.
        name: the registered learned optimizer that the arrays belong to, a key of `SIZES`.
        **options: of the learned optimizer, where they differ from the defaults; sizes are read from the arrays.

    Raises:
        ValueError: another name, no such file, not such a checkpoint, or one of another optimizer.
    """
    if name not in SIZES:
        raise ValueError(f"name must be one of {', '.join(SIZES)}, got {name!r}")
    arrays = read_flax(path)
    try:
        theta = registry.create("learned_optimizer", name).theta_from_original(arrays)
        sizes = {option: theta[tensor].shape[axis] for option, (tensor, axis) in SIZES[name].items()}
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint of {name}: {error} is missing or has another shape; "
            f"it holds {', '.join(sorted(arrays)[:8])}, ..."
        ) from None
    learned = registry.create("learned_optimizer", name, **(sizes | options))
    wanted = {key: tuple(value.shape) for key, value in learned.init_theta(Generator()).items()}
    found = {key: tuple(value.shape) for key, value in theta.items()}
    for key in sorted({*wanted, *found}):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} does not fit {name}: {key} is {found.get(key, 'absent')}, expected {wanted.get(key, 'none')}"
            )
        if not theta[key].isfinite().all():
            raise ValueError(f"{path} holds numbers that are not finite, in {key}; take an earlier checkpoint")
    return learned.bind({key: theta[key].float() for key in wanted})


def read_flax(path: Path | str) -> dict[str, Tensor]:
    """The floating-point arrays of a file of ``flax.serialization``, by their paths (``rnn_params/linear/w``).

    The format (https://flax.readthedocs.io/en/latest/api_reference/flax.serialization.html): msgpack maps, with arrays as
    extension 1, and numpy scalars as extension 3, of a shape, the name of a dtype, and the bytes.

    Raises:
        ValueError: no such file, or not of this format.
    """
    import msgpack

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; give a checkpoint written by flax.serialization, such as theta.state")
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"{path} is not of flax's msgpack format: {error}") from None
    if isinstance(tree, dict) and isinstance(tree.get("params"), dict):
        tree = tree["params"]
    found: dict[str, Tensor] = {}
    rest: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while rest:
        names, value = rest.pop()
        if isinstance(value, dict) and len(names) < _DEEPEST:
            rest += [((*names, str(key)), entry) for key, entry in value.items()]
        elif isinstance(value, Tensor):
            found["/".join(names)] = value
    if not found:
        raise ValueError(f"{path} holds no arrays; give a checkpoint of meta-parameters written by flax.serialization")
    return found


def _extension(code: int, data: bytes) -> Tensor | None:
    """An array of floating-point numbers; None for anything else, which no theta holds."""
    import msgpack

    if code not in (_NDARRAY, _SCALAR):
        return None
    match msgpack.unpackb(data, raw=True):
        case [list(shape), bytes(dtype_name), bytes(buffer)]:
            pass
        case _:
            raise ValueError("an array is not written as a shape, a dtype and bytes")
    dtype = _FLOATS.get(dtype_name)
    if dtype is None:
        return None
    if not all(type(size) is int and size >= 0 for size in shape) or len(buffer) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {dtype_name.decode()} has {len(buffer)} bytes")
    return (
        torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)
    )
