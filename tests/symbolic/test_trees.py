"""The space of Neural Optimizer Search: what its trees compute, and how they are drawn, changed and searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from metaopt.program import evaluate
from metaopt_symbolic import trees as module
from metaopt_symbolic.analysis import valid, without_redundant
from metaopt_symbolic.genome import parse
from metaopt_symbolic.planted import Planted
from metaopt_symbolic.population import Genomes
from metaopt_symbolic.search import Budget, Search, SearchConfig
from metaopt_symbolic.searchers import MAX_LENGTH
from metaopt_symbolic.trees import ADDSIGN, BINARY, OPERANDS, POWERSIGN, RATES, UNARY, Block, Trees, tree


def updates(blocks: tuple[Block, ...], grads: list[np.ndarray]) -> list[np.ndarray]:
    """Of parameters that are 0.5 at the first step, with lambda 0.1 and schedule 0.3."""
    program = tree(blocks, 0.1).program()
    tensors = {name: torch.zeros(len(grads[0]), dtype=torch.float64) for name in program.tensors}
    tensors["param"] += 0.5
    found = []
    for grad in grads:
        new = evaluate(program, tensors | {"grad": torch.from_numpy(grad)}, {"lr": 0.3})
        found.append((tensors["param"] - new[0]).numpy())
        tensors = dict(zip(program.tensors, (new[0], new[0], *new[1:]), strict=True))
    return found


GRADS = [*np.random.default_rng(0).normal(size=(5, 50))]


@pytest.mark.parametrize("name", ["powersign", "addsign"])
def test_powersign_and_addsign_are_trees(name: str) -> None:
    """Closed forms of section 5.2 of the paper, alpha = e and 1, without internal decay."""
    momentum = np.zeros(50)
    for grad, found in zip(GRADS, updates({"powersign": POWERSIGN, "addsign": ADDSIGN}[name], GRADS), strict=True):
        momentum = 0.9 * momentum + 0.1 * grad
        agree = np.sign(grad) * np.sign(momentum)
        direction = np.exp(agree) * grad if name == "powersign" else (1 + agree) * grad
        np.testing.assert_allclose(found, 0.1 * 0.3 * direction, rtol=1e-12, atol=1e-15)


def test_operands_are_those_of_the_paper() -> None:
    g, m, v, c, w = np.zeros(50), np.zeros(50), np.zeros(50), np.zeros(50), np.full(50, 0.5)
    g = GRADS[0]
    m, v, c = 0.1 * g, 0.001 * g**2, 0.001 * g**3
    expected = [
        g, g**2, g**3, m, v, c, np.sign(g), np.sign(m), 1, 2, 0.1 * w, 0.01 * w, 1e-3 * w, 1e-4 * w,
        m / (np.sqrt(v) + 1e-8), g / (np.sqrt(v) + 1e-8), 0.3,
    ]  # fmt: skip
    for operand, value in zip(OPERANDS, expected, strict=True):
        (found,) = updates((Block(operand, "g", binary="add"),), GRADS[:1])
        # 0.5 - update is rounded at 1e-16, before 0.5 is taken away again
        np.testing.assert_allclose(found, 0.03 * (value + g), rtol=1e-9, atol=1e-15, err_msg=str(operand))


def test_a_tree_is_its_choices_and_random_ones_are_uniform() -> None:
    space = module._Space(3)
    found = space.random(4000, np.random.default_rng(0))
    assert valid(found).all()
    tokens = space._tokens(found)
    for array, again in zip(found._arrays, space._of(tokens)._arrays, strict=True):
        np.testing.assert_array_equal(array, again)
    # those whose update would be no tensor are missing, so not quite uniform
    for column, choices in zip(tokens.T, space._choices, strict=True):
        counts = np.bincount(column, minlength=choices)
        assert len(counts) == choices and counts.min() > 0.5 * 4000 / choices
    assert [*space._choices] == [n for k in (17, 18, 19) for n in (k, k, len(UNARY), len(UNARY), len(BINARY))] + [
        len(RATES)
    ]
    powersign = Genomes.of([tree((*POWERSIGN, Block("z2", "g")), 0.1)], MAX_LENGTH, found.variables)
    for blocks in (Genomes.of([tree(ADDSIGN, 1.0)], MAX_LENGTH, found.variables), powersign):
        assert space._of(space._tokens(blocks))[0] == blocks[0]


def test_children_differ_in_one_choice() -> None:
    space, rng = module._Space(2), np.random.default_rng(0)
    parents = space.random(3000, rng)
    children = space.children(parents, rng)
    assert valid(children).all()
    changed = space._tokens(children) != space._tokens(parents)
    assert (changed.sum(1) == 1).all() and changed.any(0).all()


def test_the_search_finds_sign_momentum_with_decay_from_scratch(tmp_path: Path) -> None:
    hidden = tree((Block("m", "decay1", first=("sign", 0.0), binary="add"),), 0.01)
    config = SearchConfig(tree((Block("g", "g"),), 0.1).text(), "trees", {"blocks": 2, "population": 200})
    search = Search(config, Planted(hidden), tmp_path)
    champion = search.run(Budget(unique=1500))
    # gradient descent has -0.7, the best local optimum near it -0.14
    assert champion.score.fitness > -0.02, champion.genome.text()


def test_an_elite_of_another_worker_is_a_tree_again() -> None:
    searcher = Trees(blocks=3, population=4)
    plain = tree((Block("g", "g"),), 0.1)
    searcher.begin(plain, -1.0)
    elite = without_redundant(tree(ADDSIGN, 1.0))
    assert len(elite.tensors) == 3  # it has lost two slots
    searcher.welcome(parse(elite.text()), 0.0)
    assert without_redundant(searcher.best[0]) == elite
    children, _ = searcher.ask(2, np.random.default_rng(0))
    assert valid(children).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"blocks must be in \[1, 10\], got 0"):
        Trees(blocks=0)
    with pytest.raises(ValueError, match="can be asked for at most 500 children, got 501"):
        searcher = Trees()
        searcher.begin(tree((Block("g", "g"),), 0.1), 0.0)
        searcher.ask(501, np.random.default_rng(0))
