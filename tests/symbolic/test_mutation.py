"""Mutation: what children differ in, and how often."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from genome_cases import ADAMW, EVERYTHING, descendants
from scipy import stats

from metaopt_symbolic.analysis import valid
from metaopt_symbolic.genome import Assign, Genome
from metaopt_symbolic.language import EXTRAS, FUNCTIONS, NUMBER_OF, PAPER
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import CONSTANT, Genomes, Variables

INSERT = Mutation(insert=1, delete=0, modify=0)
DELETE = Mutation(insert=0, delete=1, modify=0)
MODIFY = Mutation(insert=0, delete=0, modify=1)
CONSTANTS = Mutation(insert=0, delete=0, modify=0, tune=1)


def children(mutation: Mutation, parents: Genomes, seed: int = 0) -> Genomes:
    return mutation.children(parents, np.random.default_rng(seed))


def pairs(parents: Genomes, found: Genomes) -> list[tuple[Genome, Genome]]:
    return [(parents[k], found[k]) for k in range(len(parents))]


def without(body: tuple[Assign, ...], k: int) -> tuple[Assign, ...]:
    return (*body[:k], *body[k + 1 :])


def test_an_inserted_statement_is_the_only_difference() -> None:
    parents = descendants().select(slice(0, None, 10))
    for parent, child in pairs(parents, children(INSERT, parents)):
        assert parent.body in [without(child.body, k) for k in range(len(child.body))]


def test_a_deleted_statement_is_the_only_difference() -> None:
    parents = descendants().select(slice(0, None, 10))
    assert parents.lengths.min() > 1
    for parent, child in pairs(parents, children(DELETE, parents)):
        assert child.body in [without(parent.body, k) for k in range(len(parent.body))]


def test_any_statement_may_be_deleted() -> None:
    body = tuple(Assign(f"x{k}", "square", ("g",)) for k in range(4))
    parents = Genomes.of([replace(ADAMW, outputs=("w", "m", "v"), body=body)] * 400)
    left = [child.body for _, child in pairs(parents, children(DELETE, parents))]
    for k in range(4):
        assert left.count(without(body, k)) == pytest.approx(100, abs=40)


def test_a_modified_argument_is_the_only_difference() -> None:
    parents = descendants().select(slice(0, None, 10))
    for parent, child in pairs(parents, children(MODIFY, parents)):
        (changed,) = [(a, b) for a, b in zip(parent.body, child.body, strict=True) if a != b]
        assert changed[0][:2] == changed[1][:2]
        assert sum(a != b for a, b in zip(changed[0].args, changed[1].args, strict=True)) == 1


def test_children_are_stored_as_their_genomes_would_be() -> None:
    """Nothing is left behind in unused places, where it would make equal rows different."""
    found = children(EVERYTHING, descendants())
    chosen = found.select(np.random.default_rng(3).choice(len(found), 1000, replace=False))
    require_stored_as_new(chosen)
    without_room = replace(ADAMW, body=ADAMW.body[:-1])  # whose last line has a constant
    require_stored_as_new(children(DELETE, Genomes.of([without_room] * 100, max_length=len(without_room.body))))


def require_stored_as_new(chosen: Genomes) -> None:
    again = Genomes.of([chosen[k] for k in range(len(chosen))], chosen.max_length, chosen.variables)
    for array in ("functions", "targets", "args", "constants", "lengths"):
        np.testing.assert_array_equal(getattr(again, array), getattr(chosen, array))


def test_parents_stay_as_they_are() -> None:
    parents = descendants().select(slice(0, 500))
    before = [parents[k] for k in range(500)]
    children(EVERYTHING, parents)
    assert [parents[k] for k in range(500)] == before


def test_the_same_seed_gives_the_same_children() -> None:
    parents = descendants().select(slice(3000, 3500))
    first, again, other = (children(EVERYTHING, parents, seed) for seed in (1, 1, 2))
    for array in ("functions", "targets", "args", "constants", "lengths"):
        np.testing.assert_array_equal(getattr(first, array), getattr(again, array))
    assert (first.args != other.args).any()


def test_weights_are_the_odds_of_the_three() -> None:
    parents = Genomes.of([ADAMW] * 9000)
    grown = children(Mutation(insert=1, delete=0, modify=2), parents).lengths > 9
    # nine tenths of the insertions into AdamW are valid, and as many of the modifications
    assert grown.mean() == pytest.approx(1 / 3, abs=0.03)


def test_inserted_statements_call_the_functions_that_are_allowed() -> None:
    parents = Genomes.of([ADAMW] * 5000)
    only = children(replace(INSERT, functions=("dot", "get_pi")), parents)
    used = set(only.functions[np.arange(64) < only.lengths[:, None]].tolist())
    assert used == {NUMBER_OF[name] for name in ("dot", "get_pi")} | {NUMBER_OF[a.function] for a in ADAMW.body}
    paper = children(INSERT, parents)
    used = set(paper.functions[np.arange(64) < paper.lengths[:, None]].tolist())
    assert used == {NUMBER_OF[name] for name in PAPER}
    everything = children(replace(INSERT, functions=tuple(FUNCTIONS)), parents)
    assert {NUMBER_OF[name] for name in EXTRAS} <= set(everything.functions.ravel().tolist())


def inserted(parents: Genomes, found: Genomes) -> list[tuple[int, Assign]]:
    lines = []
    for parent, child in pairs(parents, found):
        k = next(k for k in range(len(child.body)) if parent.body[k : k + 1] != child.body[k : k + 1])
        lines.append((k, child.body[k]))
    return lines


def test_insertion_is_everywhere_and_of_every_variable() -> None:
    parents = Genomes.of([ADAMW] * 4000)
    lines = inserted(parents, children(INSERT, parents))
    assert {place for place, _ in lines} == set(range(10))
    assert {arg for _, a in lines for arg in a.args if isinstance(arg, str)} == {
        "w", "g", "m", "v", "lr", "g2", "root", "update", "decay"
    }  # fmt: skip
    targets = [a.target for _, a in lines]
    new = [target for target in targets if target.startswith("x")]
    assert set(targets) - set(new) == {"w", "g", "m", "v", "lr", "g2", "root", "update", "decay"}
    # half before invalid children are thrown away, which are those that hide a variable
    assert 0.5 < len(new) / len(targets) < 0.7


def test_new_constants_are_normal() -> None:
    parents = Genomes.of([ADAMW] * 5000)
    constants = [
        arg for _, a in inserted(parents, children(INSERT, parents)) for arg in a.args if isinstance(arg, float)
    ]
    assert len(constants) > 500
    assert stats.kstest(constants, "norm").pvalue > 1e-3


def test_constants_are_scaled_by_powers_of_two_or_drawn_anew() -> None:
    body = (Assign("update", "mul", ("g", 1e5)),)
    parents = Genomes.of([replace(ADAMW, body=body)] * 6000)
    values = children(CONSTANTS, parents).constants[:, 0, 1]
    scaled = values[np.abs(values) > 100]
    assert len(scaled) / len(values) == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(np.log2(scaled / 1e5), "norm").pvalue > 1e-3
    assert stats.kstest(values[np.abs(values) < 100], "norm").pvalue > 1e-3


def test_constants_stay_within_1e10() -> None:
    parents = Genomes.of([replace(ADAMW, body=(Assign("update", "mul", ("g", -1e10)),))] * 200)
    values = children(CONSTANTS, parents).constants[:, 0, 1]
    assert values.min() == -1e10
    assert (values == -1e10).sum() > 20


def test_a_search_over_hyperparameters_changes_one_constant() -> None:
    parents = Genomes.of([ADAMW] * 500)
    found = children(CONSTANTS, parents)
    np.testing.assert_array_equal(found.functions, parents.functions)
    np.testing.assert_array_equal(found.args, parents.args)
    changed = found.constants != parents.constants
    np.testing.assert_array_equal(changed.sum((1, 2)), 1)
    assert (changed.any(0) == (parents.constants[0] != 0)).all()


def test_programs_grow_to_the_room_there_is() -> None:
    generation = Genomes.of([ADAMW] * 300, max_length=11)
    for seed in range(4):
        generation = children(replace(INSERT, delete=0.2), generation, seed)
        assert valid(generation).all()
    assert generation.lengths.max() == 11


def test_only_the_variables_of_the_population_are_assigned() -> None:
    variables = Variables(ADAMW.tensors, ADAMW.scalars, ADAMW.outputs, ("g2", "root", "decay", "spare"))
    found = Genomes.of([ADAMW] * 500, variables=variables)
    for seed in range(3):
        found = children(INSERT, found, seed)
    assert valid(found).all()
    assert set(variables.names) == {a.target for k in range(500) for a in found[k].body} | {"w", "g"}


def test_without_constants_a_program_is_its_own_child() -> None:
    genome = replace(ADAMW, body=(Assign("update", "mul", ("g", "lr")),))
    found = children(CONSTANTS, Genomes.of([genome, ADAMW]))
    assert found[0] == genome
    assert found[1] != ADAMW
    assert (found.args[1] == CONSTANT).sum() == (Genomes.of([ADAMW]).args[0] == CONSTANT).sum()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 and not all 0"):
        Mutation(insert=0, delete=0, modify=0)
    with pytest.raises(ValueError, match=r"constant is a probability in \[0, 1\], got 2"):
        Mutation(constant=2)
    with pytest.raises(ValueError, match=r"functions must be some of get_pi.*got \['lgamma'\]"):
        Mutation(functions=("lgamma", "add"))
    with pytest.raises(ValueError, match=r"splice is a probability in \[0, 1\], got 1.5"):
        Mutation(splice=1.5)
    with pytest.raises(ValueError, match="scales must be numbers above 0"):
        Mutation(scales=(1.0, 0.0))


# -- what the paper has not ----------------------------------------------------------------------------------------------


def rewired(parent: Genome, child: Genome) -> tuple[int, Assign, bool]:
    """Where a statement was inserted, which, and whether the one after it reads its value instead of what it read."""
    for k, inserted in enumerate(child.body):
        (before, old, after), (same, new, left) = (
            (b[:at], b[at : at + 1], b[at + 1 :]) for b, at in ((parent.body, k), (child.body, k + 1))
        )
        if before == same[:k] and after == left and [a[:2] for a in old] == [a[:2] for a in new]:
            return k, inserted, old != new
    raise AssertionError("more than a statement and an argument differ")


def test_a_spliced_statement_stands_in_the_flow() -> None:
    parents = Genomes.of([ADAMW] * 1000)
    found = children(replace(INSERT, splice=1.0), parents)
    in_flow = 0
    for parent, child in pairs(parents, found):
        k, inserted, spliced = rewired(parent, child)
        if not spliced:
            # of no arguments, or the last one
            assert not inserted.args or k == len(parent.body)
            continue
        in_flow += 1
        ((old, new),) = [
            pair for pair in zip(parent.body[k].args, child.body[k + 1].args, strict=True) if pair[0] != pair[1]
        ]
        assert new == inserted.target not in {a.target for a in parent.body}
        assert old in inserted.args
    assert in_flow > 650
    assert valid(found).all()


def test_a_duplicate_says_what_the_program_says() -> None:
    parents = Genomes.of([ADAMW] * 300)
    said = {a[1:] for a in ADAMW.body}
    for mutation in (replace(INSERT, duplicate=1.0), replace(INSERT, duplicate=1.0, splice=1.0)):
        found = children(mutation, parents)
        copies = [rewired(parent, child)[1] for parent, child in pairs(parents, found)]
        assert {a[1:] for a in copies} == said
        assert valid(found).all()
    read = [spliced for _, _, spliced in map(rewired, *zip(*pairs(parents, found), strict=True))]
    assert np.mean(read) > 0.8


@pytest.mark.parametrize(
    ("settings", "low", "high", "share"),
    [
        # of 0.9 times 2^a, that is of a, and of those drawn afresh from N(0, 1)
        ({}, 0.8, 0.95, (0.0987 + 0.0408) / 2),
        ({"complement": 1.0}, 0.8, 0.95, (0.6827 + 0.0408) / 2),
        ({"scales": (0.01,)}, 0.88, 0.92, (0.9985 + 0.0106) / 2),
        ({"scales": (0.01, 1.0)}, 0.88, 0.92, ((0.9985 + 0.0256) / 2 + 0.0106) / 2),
    ],
)
def test_tuning_changes_constants_alone(settings: dict[str, Any], low: float, high: float, share: float) -> None:
    parents = Genomes.of([ADAMW] * 8000)
    found = children(replace(CONSTANTS, **settings), parents)
    np.testing.assert_array_equal(found.args, parents.args)
    decays = found.constants[:, 1, 2]
    moved = decays[decays != 0.9]
    assert len(moved) == pytest.approx(2000, rel=0.1)  # one of four constants
    assert np.mean((moved > low) & (moved < high)) == pytest.approx(share, abs=0.035)  # three standard errors
