"""Candidates from text and JSON that anybody may have written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from metaopt_symbolic.genome import SEEDS, Assign, Genome, GenomeError, from_json, parse


def genome(*body: Assign, tensors: Any = ("w", "g"), scalars: Any = ("lr",), outputs: Any = ("update",)) -> Genome:
    return Genome(tensors, scalars, outputs, body or (Assign("update", "mul", ("g", "lr")),))


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_come_back_from_text_and_json(name: str) -> None:
    seed = parse(SEEDS[name])
    assert seed.text() == SEEDS[name]
    assert from_json(json.loads(json.dumps(seed.to_json()))) == seed
    assert seed.program().tensors == ("param", "grad", *seed.slots)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2])
def test_every_float_comes_back(number: float) -> None:
    one = genome(Assign("update", "mul", ("g", number)))
    for back in (parse(one.text()), from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))):
        assert repr(back.body[0].args[1]) == repr(number)
        assert back.digest == one.digest


def test_equal_candidates_have_one_digest() -> None:
    whole: Any = 2
    assert genome(Assign("update", "mul", ("g", whole))).digest == genome(Assign("update", "mul", ("g", 2.0))).digest


def test_both_zeros_stay_apart() -> None:
    body = [
        Assign("a", "exact_div", ("g", 0.0)),
        Assign("b", "exact_div", ("g", -0.0)),
        Assign("update", "add", ("a", "b")),
    ]
    assert len(genome(*body).program().statements) == 4


@pytest.mark.parametrize("name", ["\uff47", "\u03b2", "torch", "nan", "inf", "abs", "for", "1x", ""])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(GenomeError, match="cannot name a variable"):
        genome(Assign(name, "abs", ("g",)), Assign("update", "mul", ("g", "lr")))


def test_inputs_differ_and_numbers_are_no_state() -> None:
    with pytest.raises(GenomeError, match="inputs must differ, got w, g, m, m, lr"):
        genome(tensors=("w", "g", "m", "m"), outputs=("update", "m", "m"))
    with pytest.raises(GenomeError, match="inputs must differ"):
        parse("def f(w, w, lr):\n    update = abs(w)\n    return update\n")
    with pytest.raises(GenomeError, match="'lr' is a number at the start, so it cannot be state"):
        genome(tensors=("w", "g", "m"), outputs=("update", "lr"))


@pytest.mark.parametrize("name", ["param", "grad", "step"])
def test_the_optimizers_own_names_are_no_slots(name: str) -> None:
    with pytest.raises(GenomeError, match="is a name of the optimizer"):
        genome(tensors=("w", "g", name), outputs=("update", name)).program()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("update = mul(g, 1" + "0" * 400 + ")", "larger than floats"),
        ("update = mul(g, " + "(" * 100 + "1" + ")" * 100 + ")", "brackets may be 64 deep"),
        ("update = mul(g, " + "-" * 50_000 + "1)", "64 signs"),
        ("update = mul(g, True)", "must be a plain name"),
        ("update = mul(g, x=1)", "arguments have no names"),
        ("update = g + g", "is no assignment of a call"),
        ("update = g.mul(g)", "must be a plain name"),
        ("update, x = mul(g, g)", "must be a plain name"),
        ("update = mul(*g)", "must be a plain name"),
        ("import os", "is no assignment of a call"),
    ],
)
def test_other_text_is_refused(line: str, message: str) -> None:
    with pytest.raises(GenomeError, match=message):
        parse(f"def f(w, g, lr):\n    {line}\n    return update\n")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": "wg"},
        {"tensors": None},
        {"body": [["update", "mul", ["g", 10**400]]]},
        {"body": [["update", "mul", ["g", {"number": "much"}]]]},
        {"body": [["update", "mul", ["g", None]]]},
        {"body": [["update", "mul"]]},
        {"body": [["update", "exec", ["g"]]]},
        {"body": [[["update"], "abs", ["g"]]]},
        {"body": 3},
    ],
)
def test_other_json_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GenomeError):
        from_json({**genome().to_json(), **change})
