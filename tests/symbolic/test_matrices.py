"""Functions of matrices in the search: insertion, behaviour, training, the file of a rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaopt import registry
from metaopt.evaluate import split_losses
from metaopt.program import evaluate_tree, parse_program, python_source
from metaopt.program.build import compiler
from metaopt.program.population import PopulationStep, encode
from metaopt.resolve import resolve_rule
from metaopt.unroll import start, unroll
from metaopt_symbolic.analysis import analyse, valid
from metaopt_symbolic.evaluate import schedule, train
from metaopt_symbolic.fingerprint import fingerprint
from metaopt_symbolic.genome import SEEDS, Genome, parse
from metaopt_symbolic.language import INSERTED, MATRICES, NUMBER_OF, Kind
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes
from metaopt_symbolic.rule_file import write_rule_file
from metaopt_symbolic.searchers import Evolution, RandomSearch

MUON = parse(SEEDS["muon"])


def using(line: str) -> Genome:
    return parse(
        f"def train(w, g, m, lr):\n    x = {line}\n    update = mul(g, x)\n    update = mul(update, lr)\n    return update, m\n"
    )


def test_a_search_inserts_them_when_asked_to() -> None:
    parents = Genomes.of([MUON] * 3000)
    children = Mutation(1, 0, 0, functions=INSERTED["matrix"]).children(parents, np.random.default_rng(0))
    assert valid(children).all()
    called = np.bincount(children.functions[:, :16].ravel(), minlength=len(NUMBER_OF))
    of_parents = np.bincount(parents.functions[:, :16].ravel(), minlength=len(NUMBER_OF))
    assert all(called[NUMBER_OF[name]] > of_parents[NUMBER_OF[name]] for name in MATRICES)
    searchers: list[Callable[..., Any]] = [Evolution, RandomSearch]
    for searcher in searchers:
        with pytest.raises(ValueError, match="functions must be one of paper, all, matrix, losses, got 'none'"):
            searcher(functions="none")


def test_kinds() -> None:
    genomes = Genomes.of([using(f"{name}(g)") for name in MATRICES])
    kinds = dict(zip(MATRICES, analyse(genomes).kinds[:, 0].tolist(), strict=True))
    tensors = {name: Kind.TENSOR for name in ("orthogonalise", "row_mean", "column_mean")}
    assert kinds == {**tensors, "row_count": Kind.NUMBER, "column_count": Kind.NUMBER}


def test_fingerprints_tell_them_apart() -> None:
    lines = [f"{name}(g)" for name in MATRICES] + ["copy(g)", "norm(g)", "mean(g)"]
    prints = fingerprint([using(line).program() for line in lines])
    assert len(np.unique(prints.hashes, axis=0)) == len(lines)
    same = fingerprint([using(line).program() for line in ("row_count(g)", "row_count(w)")]).hashes
    assert (same[0] == same[1]).all()


def test_random_programs_are_alike_in_every_execution() -> None:
    """Descendants of Muon; entries that a relative error of 1e-13 in the inputs changes by a thousandth are not compared."""
    mutation, rng = Mutation(functions=INSERTED["matrix"]), np.random.default_rng(0)
    generation = Genomes.of([MUON] * 300)
    for _ in range(8):
        generation = mutation.children(generation, rng)
    genomes = [generation[k] for k in range(len(generation))]
    programs = [genome.program() for genome in genomes]
    assert sum(bool(p.matrix_ops) for p in programs) > 200
    shapes = ((3, 4), (2, 3, 2), (5,), ())
    sizes = [int(np.prod(shape)) for shape in shapes]
    rows = [torch.from_numpy(rng.normal(size=(3, sum(sizes)))) for _ in programs]

    def by_tree(program: Any, row: torch.Tensor) -> torch.Tensor:
        leaves = zip(*(tensor.split(sizes) for tensor in row), strict=True)
        tree = [
            {name: part.reshape(shape) for name, part in zip(("param", "grad", "m"), leaf, strict=True)}
            for shape, leaf in zip(shapes, leaves, strict=True)
        ]
        columns = zip(*evaluate_tree(program, tree, {"lr": 0.7}), strict=True)
        return torch.stack([torch.cat([leaf.flatten() for leaf in column]) for column in columns])

    population, runs = encode(programs), torch.arange(len(programs))
    params, grads, slots = (torch.stack([row[k] for row in rows]) for k in range(3))
    (numbers,) = population.numbers(runs, {"lr": 0.7}, torch.float64)
    slots = slots[None].clone()
    PopulationStep(population, runs, shapes)(params, grads, slots, numbers)
    compared = 0.0
    for k, (genome, program, row) in enumerate(zip(genomes, programs, rows, strict=True)):
        assert parse(genome.text()) == genome
        values = by_tree(program, row)
        again = by_tree(parse_program(python_source(program)), row)
        torch.testing.assert_close(again, values, rtol=0, atol=0, equal_nan=True)
        noise = 1 + 1e-13 * torch.from_numpy(rng.choice([-1.0, 1.0], (3, *row.shape)))
        moved = torch.stack([by_tree(program, row * factor) - values for factor in noise]).abs().amax(0)
        bound = 100 * moved + 1e-12 * values.abs()
        sure = bound.isfinite() & (bound < 1e-3 * values.abs())
        found = torch.stack([params[k], slots[0, k]])
        assert ((found - values).abs() <= bound)[sure].all(), genome.text()
        compared += float(sure.double().mean()) / len(programs)
    assert compared > 0.8


# float32, of products in another order, over 30 steps
def test_training_is_the_unroll_with_the_file_of_the_rule_and_changes_no_run_beside_it(tmp_path: Path) -> None:
    task = registry.create("task", "digits_mlp", hidden=(8,), batch_size=16)
    rule = resolve_rule(f"{write_rule_file(MUON, tmp_path / 'found.py', 'Found')}:Found")
    with torch.no_grad():
        carry = start(task, rule, [3, 4])
        for rate in schedule(30).tolist():
            _, carry = unroll(task, rule, carry, 1, hp={"lr": rate * rule.hp["lr"]})
    expected = task.normalize(split_losses(task, carry.params, task.valid))
    programs = [MUON.program(), parse(SEEDS["lion"]).program()]
    both = train(task, encode(programs), horizon=30, seeds=(3, 4))
    torch.testing.assert_close(both.losses[0, 0, :, -1], expected.double().cpu(), rtol=0, atol=2e-3)
    if compiler() is not None:
        alone = train(task, encode(programs[1:]), horizon=30, seeds=(3, 4))
        assert torch.equal(both.losses[1:], alone.losses)
