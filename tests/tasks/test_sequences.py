"""Procedural sequences: every one obeys the rule that its source states."""

import math

import pytest
import torch

from metaopt.task import Split
from metaopt_tasks.data.sequences import copy_sequences, dyck, dyck_entropy, modular_addition, recall


def rows(splits: dict[str, Split], key: str = "tokens") -> torch.Tensor:
    return torch.cat([split.tensors[key] for split in splits.values()])


def probability(string: tuple[int, ...], kinds: int, max_depth: int) -> float:
    """Of a string of brackets, by replaying the draw that `dyck` documents; 0 if the string is not balanced."""
    stack: list[int] = []
    p = 1.0
    for t, token in enumerate(string):
        may_open, may_close = len(stack) < max_depth and len(stack) < len(string) - t, bool(stack)
        p *= 0.5 if may_open and may_close else 1.0
        if token <= kinds:
            if not may_open:
                return 0.0
            stack.append(token)
            p /= kinds
        elif not stack or stack.pop() != token - kinds:
            return 0.0
    return 0.0 if stack else p


@pytest.mark.parametrize(("context", "kinds", "max_depth"), [(32, 2, 6), (12, 3, 2), (8, 1, 8)])
def test_dyck_strings_are_balanced_typed_and_no_deeper_than_asked(context: int, kinds: int, max_depth: int) -> None:
    tokens = rows(dyck(context=context, kinds=kinds, max_depth=max_depth))
    assert tokens.shape == (8192, context + 1) and not tokens[:, 0].any()
    strings = [tuple(row) for row in tokens[:, 1:].tolist()]
    assert all(probability(string, kinds, max_depth) > 0 for string in strings[:2000])
    if kinds == 1:
        catalan = math.comb(context, context // 2) // (context // 2 + 1)
        assert len(set(strings)) == catalan, "all balanced strings occur"


@pytest.mark.parametrize(("context", "kinds", "max_depth"), [(6, 2, 3), (6, 2, 1), (8, 1, 8)])
def test_dyck_entropy_is_that_of_all_strings_counted_out(context: int, kinds: int, max_depth: int) -> None:
    alphabet = torch.arange(1, 2 * kinds + 1)
    strings = torch.cartesian_prod(*[alphabet] * context).tolist()
    chances = [p for p in (probability(tuple(string), kinds, max_depth) for string in strings) if p]
    assert sum(chances) == pytest.approx(1.0)
    entropy = -sum(p * math.log(p) for p in chances) / context
    assert dyck_entropy(context, kinds, max_depth) == pytest.approx(entropy)


def test_dyck_entropy_is_the_mean_surprise_of_the_strings_drawn() -> None:
    strings = rows(dyck())[:4000, 1:].tolist()
    surprise = [-math.log(probability(tuple(string), 2, 6)) / 32 for string in strings]
    assert sum(surprise) / len(surprise) == pytest.approx(dyck_entropy(), rel=0.01)


def test_copies_repeat_what_stands_before_the_separator_and_only_they_count() -> None:
    splits = copy_sequences(context=10, symbols=5)
    tokens, mask = rows(splits), rows(splits, "mask")
    assert tokens.shape == (8192, 11) and not tokens[:, 5].any()
    assert torch.equal(tokens[:, :5], tokens[:, 6:])
    assert tokens[:, :5].unique().tolist() == [1, 2, 3, 4, 5]
    assert mask.shape == (8192, 10) and mask[0].tolist() == [False] * 5 + [True] * 5 and bool((mask == mask[0]).all())


def test_recall_asks_for_every_key_once_and_answers_with_its_value() -> None:
    splits = recall(context=16, keys=6, values=3)
    tokens, mask = rows(splits), rows(splits, "mask")
    for row, counted in zip(tokens[:500].tolist(), mask[:500].tolist(), strict=True):
        told, asked = row[:8], row[9:]
        pairs = dict(zip(told[::2], told[1::2], strict=True))
        assert len(pairs) == 4 and row[8] == 0
        assert dict(zip(asked[::2], asked[1::2], strict=True)) == pairs
        targets = [token for token, counts in zip(row[1:], counted, strict=True) if counts]
        assert targets == asked[1::2], "what counts are the values that can be known"
    assert rows(splits)[:, 0].unique().tolist() == [1, 2, 3, 4, 5, 6]
    assert bool((mask == mask[0]).all())
    assert bool((tokens[:, 0] != tokens[:, 9]).any()), "the order of the questions varies"


def test_modular_sums_are_right_and_every_pair_is_in_one_split() -> None:
    splits = modular_addition(p=13)
    tokens = rows(splits)
    assert bool(((tokens[:, 0] + tokens[:, 1]) % 13 == tokens[:, 3]).all())
    assert len(tokens) == len(tokens[:, :2].unique(dim=0)) == 169 and bool((tokens[:, 2] == 13).all())
    assert rows(splits, "mask")[0].tolist() == [False, False, True]
    assert [round(len(split) / 169, 2) for split in splits.values()] == [0.70, 0.15, 0.15]


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="context must be even and at least 2, got 7"):
        dyck(context=7)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 6"):
        dyck(kinds=0)
    with pytest.raises(ValueError, match="context must be even and at least 2, got 9"):
        copy_sequences(context=9)
    with pytest.raises(ValueError, match=r"multiple of 4 from 4 to 4 \* keys = 32, got 36"):
        recall(context=36)
    with pytest.raises(ValueError, match="p must be at least 2, got 1"):
        modular_addition(p=1)
