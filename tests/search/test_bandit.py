"""The bandit's arithmetic, by hand."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from metaopt.search.bandit import Bandit


def asked(bandit: Bandit, **counts: int) -> None:
    for arm, count in counts.items():
        for _ in range(count):
            bandit.choose([arm])


def test_an_arm_never_asked_comes_first() -> None:
    bandit = Bandit(["a", "b", "c"], epsilon=1.0)
    assert {bandit.choose() for _ in range(3)} == {"a", "b", "c"}


def test_rewards_are_decayed_improvements() -> None:
    """a: 0.4, then nothing of b's, then 0.1: sums 0.4 * 0.5^2 + 0.1 over weights 0.5^2 + 1."""
    bandit = Bandit(["a", "b"], decay=0.5)
    bandit.tell("a", 0.4, 2.0)
    bandit.tell("b", -5.0, 1.0)
    bandit.tell("a", 0.1, 4.0)
    a, b = (bandit.state()[arm] for arm in "ab")
    assert a["reward"] == pytest.approx(0.2)
    assert a["weight"] == pytest.approx(1.25)
    assert (a["cost"], a["told"]) == (6.0, 2)
    assert (b["reward"], b["weight"]) == (0.0, 0.5)  # a bad child costs no more than a useless one
    bandit.tell("b", math.nan, 0.0)
    assert bandit.state()["b"]["reward"] == 0.0


@pytest.mark.parametrize(("beyond", "winner"), [(-0.01, "a"), (0.01, "b")])
def test_the_index_weighs_value_rarity_and_cost(beyond: float, winner: str) -> None:
    """a asked 8 times, b 2, mean improvements 1 and u, costs 1 and 4, thrift 0.25:

    a: 0.75 (1 + sqrt(2 ln 10 / 8)) + 0.25 * 1
    b: 0.75 (u + sqrt(2 ln 10 / 2)) + 0.25 / 4, the same at u = 1 + sqrt(ln 10 / 4) - sqrt(ln 10) + 0.25 = 0.4913
    """
    even = 1.25 - math.sqrt(math.log(10)) / 2
    bandit = Bandit(["a", "b"], thrift=0.25, epsilon=0.0)
    asked(bandit, a=8, b=2)
    bandit.tell("a", 1.0, 1.0)
    bandit.tell("b", even + beyond, 4.0)
    assert bandit.choose() == winner


def test_thrift_alone_asks_the_cheapest() -> None:
    bandit = Bandit(["dear", "free"], thrift=1.0, epsilon=0.0)
    asked(bandit, dear=1, free=1)
    bandit.tell("dear", 1.0, 0.01)
    bandit.tell("free", 0.0, 0.0)
    assert [bandit.choose() for _ in range(5)] == ["free"] * 5


def test_epsilon_asks_the_others() -> None:
    bandit = Bandit(["a", "b", "c"], exploration=0.0, thrift=0.0, epsilon=0.25)
    asked(bandit, a=1, b=1, c=1)
    bandit.tell("a", 1.0, 0.0)
    counts = Counter(bandit.choose() for _ in range(2000))
    assert counts["a"] / 2000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 2000))  # four standard errors
    assert counts["b"] / 2000 == pytest.approx(0.125, abs=4 * math.sqrt(0.125 * 0.875 / 2000))


def test_a_restored_bandit_goes_on_as_it_would_have() -> None:
    first = Bandit(["a", "b"], seed=3)
    for i in range(10):
        first.tell(first.choose(), 0.1 * i, 1.0)
    second = Bandit(["a", "b"], seed=3)
    second.restore(json.loads(json.dumps(first.state())))
    assert [first.choose() for _ in range(20)] == [second.choose() for _ in range(20)]
    with pytest.raises(ValueError, match="name the same proposers"):
        Bandit(["a", "c"]).restore(first.state())


def test_what_makes_no_sense_is_refused() -> None:
    for arms, options in (
        ([], {}),
        (["a", "a"], {}),
        (["a"], {"decay": 0.0}),
        (["a"], {"thrift": 1.5}),
        (["a"], {"epsilon": -1}),
    ):
        with pytest.raises(ValueError, match=r"different names|must be"):
            Bandit(arms, **options)
    with pytest.raises(ValueError, match="must be finite"):
        Bandit(["a"]).tell("a", math.inf, 0.0)
    with pytest.raises(ValueError, match="cost in"):
        Bandit(["a"]).tell("a", 0.0, -1.0)
