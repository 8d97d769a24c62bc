"""Fingerprints: the same for programs that differ by algebra, others for programs that do something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from genome_cases import ADAMW, descendants

from metaopt_symbolic.analysis import analyse
from metaopt_symbolic.fingerprint import Fingerprints, fingerprint
from metaopt_symbolic.genome import SEEDS, Genome, parse
from metaopt_symbolic.population import Genomes


def of_lines(lines: str) -> Genome:
    return parse("def train(w, g, m, v, lr):\n    " + lines.replace("\n", "\n    ") + "\n    return update, m, v\n")


EQUAL = {
    "square": ("update = square(g)", "update = mul(g, g)"),
    "distributive law": ("a = add(g, w)\nupdate = mul(a, lr)", "a = mul(g, lr)\nb = mul(w, lr)\nupdate = add(b, a)"),
    "division": ("a = mul(lr, 4.0)\nupdate = exact_div(g, a)", "a = mul(g, 0.25)\nupdate = exact_div(a, lr)"),
    "double negation": ("a = negative(g)\na = negative(a)\nupdate = mul(a, lr)", "update = mul(g, lr)"),
    "logarithm of a product": ("a = mul(g, w)\nupdate = log(a)", "a = log(g)\nb = log(w)\nupdate = add(a, b)"),
    "tangent": ("update = tan(g)", "a = sin(g)\nb = cos(g)\nupdate = exact_div(a, b)"),
    "average": ("m = interpolate(g, m, 0.9)\nupdate = mul(m, lr)",
                "a = sub(m, g)\na = mul(a, 0.9)\nm = add(g, a)\nupdate = mul(m, lr)"),
    "terms that cancel": ("a = add(g, w)\na = sub(a, w)\nupdate = add(a, w)", "update = add(g, w)"),
    "what is left of terms that cancel": ("a = add(g, w)\na = sub(a, w)\na = sub(a, g)\nb = max(g, 0.0)\nupdate = add(a, b)",
                                          "update = max(g, 0.0)"),
    "norm": ("update = norm(g)\nupdate = mul(update, w)",
             "a = square(g)\na = mean(a)\nn = exact_div(g, g)\nn = norm(n)\nn = square(n)\na = mul(a, n)\na = sqrt(a)"
             "\nupdate = mul(a, w)"),
    "slots by another name": ("m = add(m, g)\nupdate = copy(m)", "v = add(g, v)\nupdate = copy(v)"),
    "a slot that stays zero": ("update = add(g, v)", "update = copy(g)"),
}  # fmt: skip
DIFFERENT = {
    "norms of a tensor and of the tree": ("a = norm(g)\nupdate = mul(g, a)", "a = global_norm(g)\nupdate = mul(g, a)"),
    "memory of the last step": ("m = copy(g)\nupdate = mul(m, lr)", "update = mul(m, lr)\nm = copy(g)"),
    "memory of the last but two": ("update = add(v, w)\nv = copy(m)\nm = copy(g)", "update = add(v, w)\nv = copy(g)"),
    "the schedule": ("update = mul(g, lr)", "update = mul(g, 0.5)"),
    "what is left of the gradient": ("update = sign(g)", "update = mul(g, 1e4)\nupdate = tanh(update)"),
    "a scale": ("update = copy(g)", "update = mul(g, 1.001)"),
    "the fifth digit": (
        "a = abs(g)\na = max(a, 3.0)\nupdate = sub(a, 1.2345)",
        "a = abs(g)\na = max(a, 3.0)\nupdate = sub(a, 1.2346)",
    ),
    "decay": ("update = mul(w, 0.01)\nupdate = add(update, g)", "update = mul(w, 0.01001)\nupdate = add(update, g)"),
}


def of(genomes: Genomes | Sequence[Genome]) -> Fingerprints:
    return fingerprint([genomes[k].program() for k in range(len(genomes))])


@cache
def fingerprinted_descendants() -> tuple[Genomes, Fingerprints]:
    genomes = descendants().select(slice(0, None, 2))
    return genomes, of(genomes)


def both(first: str, second: str) -> Fingerprints:
    return of([of_lines(first), of_lines(second)])


@pytest.mark.parametrize("what", EQUAL)
def test_programs_that_differ_by_algebra_agree(what: str) -> None:
    found = both(*EQUAL[what])
    assert (found.hashes[0] == found.hashes[1]).all()
    assert found.finite.all() and found.uses_gradient.all()


@pytest.mark.parametrize("what", DIFFERENT)
def test_programs_that_do_something_else_differ(what: str) -> None:
    found = both(*DIFFERENT[what])
    assert (found.hashes[0] != found.hashes[1]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_constant_that_differs_by_a_thousandth_is_seen(seed: str) -> None:
    genome = parse(SEEDS[seed])
    others = [genome]
    for k, line in enumerate(genome.body):
        for i, arg in enumerate(line.args):
            if isinstance(arg, float):
                for factor in (0.999, 1.001):
                    moved = line._replace(args=(*line.args[:i], arg * factor, *line.args[i + 1 :]))
                    others.append(replace(genome, body=(*genome.body[:k], moved, *genome.body[k + 1 :])))
    found = of(others).hashes
    assert len(others) > 4
    assert len(set(map(tuple, found.tolist()))) == len(others)


@pytest.mark.parametrize(
    ("lines", "finite"),
    [
        ("update = log(m)", False),
        ("a = mul(g, 1e300)\nupdate = mul(a, 1e300)", False),
        ("update = arcsin(w)", False),
        ("update = arcsin(g)", True),
        ("a = sub(g, g)\nupdate = reciprocal(a)", False),
        ("a = sub(g, g)\nupdate = div(lr, a)\nupdate = add(update, g)", True),
    ],
)
def test_updates_that_are_not_finite_are_flagged(lines: str, finite: bool) -> None:
    assert of([of_lines(lines)]).finite.tolist() == [finite]


@pytest.mark.parametrize(
    ("lines", "uses"),
    [
        ("update = mul(w, lr)", False),
        ("a = sub(g, g)\nupdate = add(w, a)", False),
        ("update = mul(m, g)", False),
        ("update = add(w, m)\nm = sign(g)", True),
        ("a = dot(g, g)\nupdate = mul(w, a)", True),
    ],
)
def test_updates_without_the_gradient_are_flagged(lines: str, uses: bool) -> None:
    assert of([of_lines(lines)]).uses_gradient.tolist() == [uses]


def test_fingerprints_do_not_depend_on_company() -> None:
    chosen = descendants().select(slice(4000, 4100))
    together = of(chosen)
    for k in (0, 17, 99):
        alone = of([chosen[k]])
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], all_[k])


def test_both_machines_give_one_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = descendants().select(slice(0, None, 65))
    compiled = of(chosen)
    monkeypatch.setenv("METAOPT_CXX", "")
    plain = of(chosen)
    np.testing.assert_array_equal(compiled.finite, plain.finite)
    alike = (compiled.hashes == plain.hashes).all(1)
    # sums in another order, and functions that are an ulp off, move what cancels or overflows
    assert alike.mean() > 0.97


def test_one_structural_hash_means_one_fingerprint() -> None:
    genomes, found = fingerprinted_descendants()
    of_hash = defaultdict(set)
    for value, prints in zip(analyse(genomes).hashes.tolist(), found.hashes.tolist(), strict=True):
        of_hash[value].add(tuple(prints))
    assert len(of_hash) > 1000
    assert max(map(len, of_hash.values())) == 1
    # algebra makes more programs the same
    assert len(set(map(tuple, found.hashes.tolist()))) < 0.95 * len(of_hash)


def test_the_gradient_that_analysis_does_not_see_is_not_used() -> None:
    genomes, found = fingerprinted_descendants()
    reads = (analyse(genomes).reads & genomes.variables.set(["g"])) != 0
    uses = found.uses_gradient
    assert not (uses & ~reads).any()
    assert 0.5 < uses.mean() < reads.mean() < 1


def test_no_genome_has_no_fingerprint() -> None:
    assert fingerprint([]).hashes.shape == (0, 2)


def test_a_rule_that_reads_the_step_has_a_fingerprint() -> None:
    text = (
        SEEDS["adamw"]
        .replace("lr):", "lr, t):")
        .replace("update = div(m, root)", "update = div(m, root)\n    update = div(update, t)")
    )
    with_t, without_t = of([parse(text)]), of([replace(ADAMW, scalars=("lr", "t"))])
    assert (with_t.hashes != without_t.hashes).all()
    np.testing.assert_array_equal(without_t.hashes, of([ADAMW]).hashes)
