"""The planted fitness: 0 for what is hidden however it is said, in a sensible order below, and a search that climbs it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from metaopt_symbolic.genome import SEEDS, parse
from metaopt_symbolic.planted import SOLVED, Planted
from metaopt_symbolic.search import Budget, Search, SearchConfig

SAID_OTHERWISE = {
    "lion": """\
def train(w, g, m, lr):
    old = mul(m, 0.9)
    new = mul(g, 0.1)
    x = add(new, old)
    size = abs(x)
    x = exact_div(x, size)
    far = sub(m, g)
    far = mul(far, 0.99)
    m = add(far, g)
    w = mul(w, 0.1)
    x = add(w, x)
    update = mul(x, 0.0001)
    update = mul(lr, update)
    return update, m
""",
    "rmsprop": """\
def train(w, g, s, unused, lr):
    a = abs(g)
    a = power(a, 2.0)
    s = interpolate(a, s, 0.99)
    unused = cosh(w)
    root = power(s, 0.5)
    root = mul(root, 1000.0)
    x = mul(g, lr)
    update = exact_div(x, root)
    return update, s, unused
""",
}


def fitness(judge: Planted, *texts: str) -> list[float]:
    return [score.fitness for score in judge.scores([parse(text).program() for text in texts])]


@pytest.mark.parametrize("name", SEEDS)
def test_the_hidden_rule_has_fitness_zero(name: str) -> None:
    hidden = parse(SEEDS[name])
    judge = Planted(hidden)
    assert fitness(judge, SEEDS[name]) == [0.0]
    assert judge.error(hidden.program()) == 0
    others = [text for other, text in SEEDS.items() if other != name]
    # AdamW and AdaBelief are the nearest
    assert max(fitness(judge, *others)) < -0.05


@pytest.mark.parametrize("name", SAID_OTHERWISE)
def test_how_it_is_said_does_not_matter(name: str) -> None:
    judge = Planted(parse(SEEDS[name]))
    (found,) = fitness(judge, SAID_OTHERWISE[name])
    # rounding in float64; a sum within it of 0 may have either sign
    assert -1e-3 < found <= 0
    assert judge.error(parse(SAID_OTHERWISE[name]).program()) < 1e-3


def test_what_is_nearer_scores_more() -> None:
    lion = SEEDS["lion"]
    one_average = lion.replace("m = interpolate(g, m, 0.99)", "m = copy(mixed)").replace("m, 0.9)", "m, 0.96)")
    no_memory = lion.replace("sign(mixed)", "sign(g)")
    chain = [lion, lion.replace("0.99", "0.98"), one_average, no_memory, lion.replace("sign", "square")]
    found = fitness(Planted(parse(lion)), *chain)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_a_wrong_learning_rate_costs_little_and_a_wrong_schedule_much() -> None:
    momentum = SEEDS["momentum"]
    rate, schedule = fitness(
        Planted(parse(momentum)), momentum.replace("0.1", "0.2"), momentum.replace("lr = mul(lr,", "lr = mul(0.6,")
    )
    assert rate == pytest.approx(-0.03 * math.log(2), rel=1e-6)
    assert schedule < 3 * rate


def test_what_is_no_number_is_the_worst() -> None:
    adamw = SEEDS["adamw"]
    judge = Planted(parse(adamw))
    assert fitness(judge, adamw.replace("root = sqrt(v)", "root = exact_sqrt(g)"), adamw) == [-math.inf, 0.0]
    assert judge.error(parse(adamw.replace("root = sqrt(v)", "root = exact_sqrt(g)")).program()) == math.inf
    assert judge.scores([]) == []


@pytest.mark.parametrize("name", ["lion", "rmsprop", "momentum", "adabelief"])
def test_solved_tells_rules_apart(name: str) -> None:
    """The hidden rule with one number twice or half as large, decays by their distance from 1, is not the hidden rule."""
    text = SEEDS[name]
    fresh = Planted(parse(text), seed=1)
    numbers = re.findall(r"0\.\d+", text)
    for k, number in enumerate(numbers):
        c = float(number)
        changed = [1 - (1 - c) / 2, 1 - (1 - c) * 2] if c > 0.5 else [c / 2, c * 2]
        for other in changed:
            parts = re.split(r"0\.\d+", text)
            put = [repr(other) if i == k else n for i, n in enumerate(numbers)]
            impostor = "".join(a + b for a, b in zip(parts, [*put, ""], strict=True))
            assert fresh.error(parse(impostor).program()) > 1.5 * SOLVED, (number, other)


def test_momentum_is_found_from_adamw(tmp_path: Path) -> None:
    hidden = parse(SEEDS["momentum"])
    search = Search(SearchConfig(SEEDS["adamw"], "effective"), Planted(hidden), tmp_path)
    fresh = Planted(hidden, seed=1)
    for unique in range(500, 5000, 500):
        champion = search.run(Budget(unique=unique))
        if fresh.error(champion.genome.program()) < SOLVED:
            return
    pytest.fail("not found")
