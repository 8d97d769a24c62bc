"""Procedural sequences whose structure, and often whose lowest loss, is known: brackets, copying, recall, modular sums.

Each source gives ``tokens`` [N, T + 1] int64, of which the first T predict the last T. Where only some of those targets
can be known, ``mask`` [N, T] bool tells which count; every sequence of a source has equally many.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.data.load import moved, split_rows

SEQUENCES = 8192


def dyck(device: Any = "cpu", context: int = 32, kinds: int = 2, max_depth: int = 6, seed: int = 0) -> dict[str, Split]:
    """Balanced strings of ``context`` brackets, after a start token: all targets count.

    A bracket opens or closes with probability 1/2 where it may do either; its kind is uniform if it opens. Tokens: 0
    starts, 1 ... kinds open, kinds + 1 ... 2 kinds close. `dyck_entropy` is the lowest expected loss. (The language that
    Hewitt et al. 2020, arXiv:2010.07515, call Dyck-(k, m).)

    Args:
        device: where the sequences live.
        context: length; even.
        kinds: of brackets.
        max_depth: of nesting.
        seed: of the draw.
    """
    if context % 2 or context < 2:
        raise ValueError(f"context must be even and at least 2, got {context}: every bracket that opens closes")
    if kinds < 1 or max_depth < 1:
        raise ValueError(f"kinds and max_depth must be at least 1, got {kinds} and {max_depth}")
    return moved(_dyck(context, kinds, max_depth, seed), device)


@cache
def _dyck(context: int, kinds: int, max_depth: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    rows = torch.arange(SEQUENCES)
    depth = torch.zeros(SEQUENCES, dtype=torch.int64)
    stack = torch.zeros(SEQUENCES, max_depth, dtype=torch.int64)
    tokens = torch.zeros(SEQUENCES, context + 1, dtype=torch.int64)
    for t in range(context):
        coin = torch.randint(2, (SEQUENCES,), generator=generator).bool()
        kind = torch.randint(kinds, (SEQUENCES,), generator=generator)
        opens = (coin | (depth == 0)) & (depth < max_depth) & (depth < context - t)
        top = stack[rows, (depth - 1).clamp_min(0)]
        tokens[:, t + 1] = torch.where(opens, 1 + kind, 1 + kinds + top)
        pushed = depth.clamp_max(max_depth - 1)
        stack[rows, pushed] = torch.where(opens, kind, stack[rows, pushed])
        depth = depth + torch.where(opens, 1, -1)
    return split_rows({"tokens": tokens})


def dyck_entropy(context: int = 32, kinds: int = 2, max_depth: int = 6) -> float:
    """The entropy of `dyck` in nats per bracket: the expected loss of a model that knows the language."""
    share = {0: 1.0}  # of the strings at each depth
    total = 0.0
    for t in range(context):
        following: dict[int, float] = {}
        for depth, p in share.items():
            may_open, may_close = depth < max_depth and depth < context - t, depth > 0
            opens = 0.5 if may_open and may_close else float(may_open)
            total += p * (opens * math.log(kinds) + (math.log(2) if may_open and may_close else 0.0))
            for new, chance in ((depth + 1, opens), (depth - 1, 1 - opens)):
                if chance:
                    following[new] = following.get(new, 0.0) + p * chance
        share = following
    return total / context


def copy_sequences(device: Any = "cpu", context: int = 16, symbols: int = 8, seed: int = 0) -> dict[str, Split]:
    """context / 2 random symbols, a separator, and the same symbols again, which count: the lowest loss is 0.

    Tokens: 0 separates, 1 ... symbols are symbols. (The copy task of Graves et al. 2014, arXiv:1410.5401.)

    Args:
        device: where the sequences live.
        context: twice the number of symbols to copy; even.
        symbols: size of the alphabet.
        seed: of the draw.
    """
    if context % 2 or context < 2:
        raise ValueError(f"context must be even and at least 2, got {context}: half of it is the copy")
    return moved(_copy(context, symbols, seed), device)


@cache
def _copy(context: int, symbols: int, seed: int) -> dict[str, Split]:
    half = context // 2
    text = 1 + torch.randint(symbols, (SEQUENCES, half), generator=Generator().manual_seed(seed))
    tokens = torch.cat([text, torch.zeros(SEQUENCES, 1, dtype=torch.int64), text], 1)
    return split_rows({"tokens": tokens, "mask": _mask(context, range(half, context))})


def recall(device: Any = "cpu", context: int = 16, keys: int = 8, values: int = 8, seed: int = 0) -> dict[str, Split]:
    """context / 4 pairs of a key and a value, a separator, and the pairs again in another order; the values there count.

    The keys of a sequence differ, so the lowest loss is 0. Tokens: 0 separates, then the keys, then the values.
    (Associative recall, Ba et al. 2016, arXiv:1610.06258, with many queries: Arora et al. 2023, arXiv:2312.04927.)

    Args:
        device: where the sequences live.
        context: four times the number of pairs.
        keys: to draw from; at least context / 4.
        values: to draw from.
        seed: of the draw.
    """
    if context % 4 or not 4 <= context <= 4 * keys:
        raise ValueError(f"context must be a multiple of 4 from 4 to 4 * keys = {4 * keys}, got {context}")
    return moved(_recall(context, keys, values, seed), device)


@cache
def _recall(context: int, keys: int, values: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    pairs = context // 4
    key = 1 + torch.rand(SEQUENCES, keys, generator=generator).argsort(1)[:, :pairs]
    value = 1 + keys + torch.randint(values, (SEQUENCES, pairs), generator=generator)
    order = torch.rand(SEQUENCES, pairs, generator=generator).argsort(1)
    told = torch.stack([key, value], -1).flatten(1)
    asked = torch.stack([key.gather(1, order), value.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([told, torch.zeros(SEQUENCES, 1, dtype=torch.int64), asked], 1)
    return split_rows({"tokens": tokens, "mask": _mask(context, range(2 * pairs + 1, context, 2))})


def modular_addition(device: Any = "cpu", p: int = 31) -> dict[str, Split]:
    """``a b = c`` with c = a + b mod p, for all p^2 pairs (a, b), each in one split; only c counts: the lowest loss is 0.

    Tokens: 0 ... p - 1 are numbers, p is the equals sign. (The task of Power et al. 2022, "Grokking", arXiv:2201.02177.)
    """
    if p < 2:
        raise ValueError(f"p must be at least 2, got {p}")
    return moved(_modular_addition(p), device)


@cache
def _modular_addition(p: int) -> dict[str, Split]:
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).unbind(1)
    tokens = torch.stack([a, b, torch.full_like(a, p), (a + b) % p], 1)
    return split_rows({"tokens": tokens, "mask": _mask(3, range(2, 3), len(tokens))})


def _mask(context: int, counted: range, size: int = SEQUENCES) -> Tensor:
    mask = torch.zeros(size, context, dtype=torch.bool)
    mask[:, list(counted)] = True
    return mask
