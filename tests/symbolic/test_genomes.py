"""Arrays of genomes, and what abstract execution says of them, against one program at a time and the engine's own checks."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from genome_cases import ADAMW, descendants, random_rows, renamed
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt.program import evaluate_tree
from metaopt_symbolic.analysis import analyse, valid, without_redundant
from metaopt_symbolic.genome import SEEDS, Assign, Genome, GenomeError, parse
from metaopt_symbolic.language import FUNCTIONS, NUMBER_OF, PAPER, Kind
from metaopt_symbolic.population import BITS, Genomes, Variables

SLOTS = 2


def compiles(genomes: Genomes, k: int) -> bool:
    try:
        genomes[k].program()
    except GenomeError:
        return False
    return True


def some(count: int) -> np.ndarray:
    return np.random.default_rng(7).choice(len(descendants()), count, replace=False)


# -- arrays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_genome_comes_back_from_the_arrays(seed: str) -> None:
    genome = parse(SEEDS[seed])
    assert Genomes.of([genome])[0] == genome


def test_descendants_come_back_from_the_arrays() -> None:
    chosen = descendants().select(some(200))
    again = Genomes.of([chosen[k] for k in range(200)], chosen.max_length, chosen.variables)
    for array in ("functions", "targets", "args", "constants", "lengths"):
        np.testing.assert_array_equal(getattr(again, array), getattr(chosen, array))


def test_other_locals_take_the_places_of_a_population() -> None:
    genome = renamed(ADAMW)
    stored = Genomes.of([ADAMW, genome])
    assert stored[0] == ADAMW
    assert stored[1] != genome
    assert renamed(stored[1]) == renamed(genome)


def test_rows_are_selected_joined_and_replaced() -> None:
    three = Genomes.of([ADAMW, replace(ADAMW, body=ADAMW.body[:-1]), ADAMW])
    again = Genomes.concatenate([three.select(np.array([2])), three.select(slice(0, 2))])
    assert [len(again[k].body) for k in range(3)] == [9, 9, 8]
    again.put(np.array([2]), three.select(np.array([0])))
    assert again[2] == ADAMW


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GenomeError, match="at least one genome"):
        Genomes.of([])
    with pytest.raises(GenomeError, match="at most 8 lines, got 9"):
        Genomes.of([ADAMW], max_length=8)
    with pytest.raises(GenomeError, match="have the inputs"):
        Genomes.of([ADAMW, parse(SEEDS["lion"])])
    many = tuple(Assign(f"y{k}", "square", ("g",)) for k in range(70))
    with pytest.raises(GenomeError, match="at most 64 variables, got 75"):
        Genomes.of([Genome(ADAMW.tensors, ADAMW.scalars, ("w", "m", "v"), many), ADAMW], max_length=90)
    with pytest.raises(GenomeError, match="at most 1 locals"):
        Genomes.of([ADAMW], variables=Variables(ADAMW.tensors, ADAMW.scalars, ADAMW.outputs, ("x",)))
    with pytest.raises(GenomeError, match="same max_length"):
        Genomes.concatenate([Genomes.of([ADAMW]), Genomes.of([ADAMW], max_length=20)])


# -- validity and kinds --------------------------------------------------------------------------------------------------


def test_thousands_of_children_compile() -> None:
    genomes = descendants()
    assert all(compiles(genomes, k) for k in some(3000))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_valid_is_what_the_engine_compiles(seed: int) -> None:
    rows = random_rows(200, seed)
    found = valid(rows)
    # the engine also compiles the dot product of a tensor and a number
    dots = (rows.functions == NUMBER_OF["dot"]).any(1)
    assert found[~dots].tolist() == [compiles(rows, int(k)) for k in np.flatnonzero(~dots)]
    assert 10 < found.sum() < 190
    np.testing.assert_array_equal(analyse(rows).valid, found)


def kind_of_line(genome: Genome, line: int) -> Kind:
    """As the engine sees what is added to a parameter."""
    shown = Assign("update", "add", ("w0", genome.body[line].target))
    slots = (Assign(slot, "copy", ("w0",)) for slot in genome.slots)  # of which the line's value shall not be a part
    body = (Assign("w0", "copy", ("w",)), *genome.body[: line + 1], shown, *slots)
    whole = Genome(genome.tensors, genome.scalars, ("update", *genome.slots), body).program()
    (addition,) = (s for s in whole.statements if s.target == whole.statements[-1].args[1])
    value = addition.args[1]
    if value in whole.element_names:
        return Kind.TENSOR
    return Kind.SCALAR if isinstance(value, float) or value in whole.scalar_names else Kind.NUMBER


def test_kinds_are_the_engines() -> None:
    chosen = descendants().select(some(60))
    kinds = analyse(chosen).kinds
    seen = set()
    for k in range(len(chosen)):
        genome = chosen[k]
        for line in range(len(genome.body)):
            assert kinds[k, line] == kind_of_line(genome, line), genome.text()
            seen.add(int(kinds[k, line]))
        assert (kinds[k, len(genome.body) :] == Kind.UNDEFINED).all()
    assert seen == {Kind.SCALAR, Kind.NUMBER, Kind.TENSOR}


# -- dependence and liveness ---------------------------------------------------------------------------------------------


def reached(genome: Genome, at: int, tainted: set[str], steps: int) -> tuple[bool, set[str]]:
    """Follow a change, forwards: of ``tainted`` before a step, or of the value of line ``at`` in it.

    Returns:
        Whether it reaches an update within ``steps``, and the outputs of the first step that it reaches.
    """
    ever, first = False, set[str]()
    for step in range(steps):
        for k, (target, _, args) in enumerate(genome.body):
            hit = not tainted.isdisjoint(args) or (step == 0 and k == at)
            tainted = tainted | {target} if hit else tainted - {target}
        ever |= genome.outputs[0] in tainted
        if step == 0:
            first = tainted & set(genome.outputs)
        tainted &= set(genome.outputs[1:])
    return ever, first


def test_liveness_and_dependence_against_following_each_change_forwards() -> None:
    chosen = descendants().select(some(400))
    analysis = analyse(chosen)
    number = chosen.variables.number
    for k in range(len(chosen)):
        genome = chosen[k]
        live = [reached(genome, line, set(), SLOTS + 1)[0] for line in range(len(genome.body))]
        assert analysis.live[k, : len(live)].tolist() == live
        assert not analysis.live[k, len(live) :].any()
        assert analysis.redundant[k] == pytest.approx(1 - sum(live) / max(len(live), 1))
        assert analysis.live_slots[k].tolist() == [
            reached(genome, -1, {slot}, SLOTS + 1)[0] for slot in genome.outputs[1:]
        ]
        for name in (*genome.tensors, *genome.scalars):
            # an input is given anew in every step, so what counts is the one that a step begins with
            ever, first = reached(genome, -1, {name}, SLOTS + 1)
            assert bool(analysis.reads[k] & BITS[number[name]]) == ever, (genome.text(), name)
            depends = {out for o, out in enumerate(genome.outputs) if analysis.depends[k, o] & BITS[number[name]]}
            assert depends == first


def test_a_variable_has_the_kind_that_it_was_given_last() -> None:
    genome = of_lines("a = norm(g)\na = abs(lr)\na = sqrt(a)\nb = copy(g)\nb = abs(a)\nupdate = mul(g, b)\nb = abs(b)")
    expected = [Kind.NUMBER, Kind.SCALAR, Kind.SCALAR, Kind.TENSOR, Kind.SCALAR, Kind.TENSOR, Kind.SCALAR]
    assert analyse(Genomes.of([genome])).kinds[0, :7].tolist() == expected


def test_a_slot_that_is_overwritten_before_it_is_read_is_dead() -> None:
    # the paper's: the last line of what became Lion
    text = (
        SEEDS["lion"]
        .replace("return", "v = cosh(update)\n    return")
        .replace("m\n", "m, v\n")
        .replace("m, lr", "m, v, lr")
    )
    genome = parse(text.replace("update = sign", "v = square(v)\n    update = sign"))
    analysis = analyse(Genomes.of([genome]))
    assert analysis.live_slots.tolist() == [[True, False]]
    assert analysis.redundant[0] == pytest.approx(2 / 9)
    assert without_redundant(genome) == parse(SEEDS["lion"])


def test_slots_that_feed_each_other_only_are_dead() -> None:
    genome = parse(
        "def train(w, g, a, b, c, lr):\n    old = copy(a)\n    a = add(b, g)\n    b = mul(old, c)\n"
        "    c = square(g)\n    update = mul(g, lr)\n    return update, a, b, c\n"
    )
    assert not analyse(Genomes.of([genome])).live_slots.any()
    assert len(without_redundant(genome).body) == 1


@torch.no_grad()
def trajectory(genome: Genome, seed: int = 0, steps: int = 3) -> torch.Tensor:
    """Updates on random tensors, each program compiled and run by itself."""
    program = genome.program()
    generator = torch.Generator().manual_seed(seed)
    slots = [dict.fromkeys(program.tensors[2:], torch.zeros(n, dtype=torch.float64)) for n in (4, 3)]
    updates = []
    for k in range(steps):
        tree = [
            {
                "param": torch.randn(n, generator=generator, dtype=torch.float64),
                "grad": torch.rand(n, generator=generator, dtype=torch.float64) - 0.5,
                **state,
            }
            for n, state in zip((4, 3), slots, strict=True)
        ]
        new = evaluate_tree(program, tree, {"lr": 0.3 + 0.2 * k})
        updates += [leaf["param"] - param for leaf, (param, *_) in zip(tree, new, strict=True)]
        slots = [dict(zip(program.tensors[2:], state, strict=True)) for _, *state in new]
    return torch.cat(updates)


def test_without_redundant_statements_a_program_does_the_same() -> None:
    chosen = descendants().select(some(200))
    analysis = analyse(chosen)
    shorter = []
    for k in range(len(chosen)):
        shorter.append(without_redundant(chosen[k]))
        assert len(shorter[-1].body) == analysis.live[k].sum()
        torch.testing.assert_close(trajectory(shorter[-1]), trajectory(chosen[k]), rtol=0, atol=0, equal_nan=True)
        again = analyse(Genomes.of([shorter[-1]]))
        assert again.redundant[0] == 0
        assert again.hashes[0] == analysis.hashes[k]
    assert sum(len(genome.tensors) < 4 for genome in shorter) > 20


# -- hashes --------------------------------------------------------------------------------------------------------------


def hash_of(genome: Genome) -> int:
    return int(analyse(Genomes.of([genome])).hashes[0])


def test_programs_of_one_hash_do_the_same() -> None:
    genomes = descendants()
    groups = defaultdict(list)
    for k, value in enumerate(analyse(genomes).hashes.tolist()):
        groups[value].append(k)
    shared = [rows for rows in groups.values() if len(rows) > 1]
    assert len(groups) > 2000
    assert len(shared) > 100
    for rows in shared[:150]:
        wanted = trajectory(genomes[rows[0]], seed=1)
        for k in rows[1:4]:
            # a folded constant may be an ulp off what the prelude computes of it
            torch.testing.assert_close(trajectory(genomes[k], seed=1), wanted, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_programs_that_differ_in_what_they_compute_differ_in_hash() -> None:
    """Every line replaced by another function, and every constant moved by one ulp."""
    hashes = [hash_of(ADAMW)]
    for k, line in enumerate(ADAMW.body):
        for function in PAPER.values():
            if function.arity == len(line.args) and function.name != line.function:
                body = (*ADAMW.body[:k], line._replace(function=function.name), *ADAMW.body[k + 1 :])
                genome = replace(ADAMW, body=body)
                if valid(Genomes.of([genome]))[0]:
                    hashes.append(hash_of(genome))
        for i, arg in enumerate(line.args):
            if isinstance(arg, float):
                moved = (*line.args[:i], math.nextafter(arg, 2), *line.args[i + 1 :])
                hashes.append(
                    hash_of(replace(ADAMW, body=(*ADAMW.body[:k], line._replace(args=moved), *ADAMW.body[k + 1 :])))
                )
    assert len(hashes) > 80
    assert len(set(hashes)) == len(hashes)


SAME = {
    "names of locals": ("a = square(g)\nupdate = mul(a, lr)", "b = square(g)\nupdate = mul(b, lr)"),
    "order of lines": (
        "a = square(g)\nb = sign(w)\nupdate = mul(a, b)",
        "b = sign(w)\na = square(g)\nupdate = mul(a, b)",
    ),
    "order of arguments": ("update = mul(g, lr)", "update = mul(lr, g)"),
    "copies": ("update = mul(g, lr)", "a = copy(g)\nupdate = mul(a, lr)\nupdate = copy(update)"),
    "copied constants": ("update = mul(g, 2.0)", "a = copy(2.0)\nupdate = mul(g, a)"),
    "how a constant comes about": ("update = mul(g, 3.0)", "a = sqrt(4.0)\na = add(a, 1.0)\nupdate = mul(g, a)"),
    "dead lines": ("update = mul(g, lr)", "a = norm(g)\nupdate = mul(g, lr)\nlr = sin(lr)\nb = dot(w, g)"),
    "inputs that are overwritten": ("update = mul(g, lr)", "w = mul(g, lr)\nupdate = copy(w)"),
    "which slot": ("m = add(m, g)\nupdate = mul(m, lr)", "v = add(v, g)\nupdate = mul(v, lr)"),
}
OTHER = {
    "order of arguments": ("update = sub(g, lr)", "update = sub(lr, g)"),
    "the third argument": ("update = interpolate(g, w, lr)", "update = interpolate(g, lr, w)"),
    "signs of zero": ("update = div(g, 0.0)", "update = div(g, -0.0)"),
    "one argument twice": (
        "update = dot(g, g)\nupdate = mul(w, update)",
        "update = dot(g, w)\nupdate = mul(w, update)",
    ),
    "inputs": ("update = mul(g, lr)", "update = mul(w, lr)"),
    "which state": ("m = add(m, g)\nupdate = mul(m, lr)", "v = mul(m, lr)\nm = add(m, g)\nupdate = mul(m, v)"),
    "before or after": ("update = mul(m, lr)\nm = add(m, g)", "m = add(m, g)\nupdate = mul(m, lr)"),
    "tensor or tree": ("a = norm(g)\nupdate = mul(g, a)", "a = global_norm(g)\nupdate = mul(g, a)"),
}


def of_lines(lines: str) -> Genome:
    return parse("def train(w, g, m, v, lr):\n    " + lines.replace("\n", "\n    ") + "\n    return update, m, v\n")


@pytest.mark.parametrize("what", SAME)
def test_hashes_do_not_see(what: str) -> None:
    first, second = map(of_lines, SAME[what])
    assert hash_of(first) == hash_of(second)


@pytest.mark.parametrize("what", OTHER)
def test_hashes_see(what: str) -> None:
    first, second = map(of_lines, OTHER[what])
    assert hash_of(first) != hash_of(second)


def test_hashes_are_the_same_on_every_machine() -> None:
    # they are archived; a value that we wrote down once
    assert hash_of(ADAMW) == 7069193328432529401


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if FUNCTIONS[name].of_tensors == 0])
def test_every_function_of_constants_folds_to_its_value(name: str) -> None:
    args = (0.3, -0.6, 1.5)[: FUNCTIONS[name].arity]
    computed = of_lines(f"a = {name}({', '.join(map(str, args))})\nupdate = mul(g, a)")
    program = computed.program()
    tensors = {n: torch.zeros(1, dtype=torch.float64) for n in program.tensors} | {
        "grad": torch.ones(1, dtype=torch.float64)
    }
    (update, *_) = evaluate_tree(program, [tensors], {"lr": 1.0})[0]
    assert hash_of(computed) == hash_of(of_lines(f"update = mul(g, {0.0 - float(update)!r})"))
