"""Nested dicts of tensors: the only container that params, state and batches use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = Any
"""A tensor, or a dict (str -> Tree)."""


def map_tree(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``function`` leaf by leaf to trees of one structure."""
    if isinstance(tree, dict):
        return {key: map_tree(function, value, *(other[key] for other in rest)) for key, value in tree.items()}
    return function(tree, *rest)


def leaves(tree: Tree) -> Iterator[Tensor]:
    """The tensors of a tree, in key order of insertion."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    else:
        yield tree


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure -> one tree with a new leading dimension."""
    return map_tree(lambda *tensors: torch.stack(tensors), trees[0], *trees[1:])


def index(tree: Tree, at: int | slice | Tensor) -> Tree:
    """Take ``leaf[at]`` of every leaf."""
    return map_tree(lambda leaf: leaf[at], tree)


def detach(tree: Tree) -> Tree:
    """Cut every leaf from the autograd graph."""
    return map_tree(lambda leaf: leaf.detach(), tree)


def select(mask: Tensor, yes: Tree, no: Tree) -> Tree:
    """Per copy: ``yes`` where ``mask`` [K] is true, else ``no``; leaves are [K, ...]."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.reshape(mask.shape + (1,) * (a.dim() - mask.dim())), a, b)

    return map_tree(choose, yes, no)
