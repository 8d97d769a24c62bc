"""A candidate written as a rule file is the candidate, with names for its numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_genomes import random_genomes

from metaopt.export import write_module
from metaopt.program import OPS, Program
from metaopt.program.trace import Symbol, Tracer
from metaopt.resolve import resolve_rule
from metaopt.rule import ElementwiseRule, flat_hp
from metaopt.torch_optimizer import optimizer
from metaopt_classic.adam import LAMB
from metaopt_symbolic.genome import SEEDS, Genome, GenomeError, from_rule, parse
from metaopt_symbolic.rule_file import rule_source, write_rule_file

CHAMPIONS: dict[str, Genome] = {**{name: parse(text) for name, text in SEEDS.items()}, "lamb": from_rule(LAMB())}
RANDOM = random_genomes(200, seed=5)


def canonical(program: Program, numbers: dict[str, float], rate: float = 1.0) -> list[tuple[str, ...]]:
    """Statements in the order in which outputs need them, with literals folded and ``lr`` as ``rate`` times the schedule's.

    Args:
        program: what to normalise.
        numbers: hyperparameters that stand for literals.
        rate: what multiplies ``lr``.
    """
    tracer = Tracer(())
    made = {s.target: s for s in program.statements}
    known: dict[str, Symbol | float] = {}

    def value(arg: str | float) -> Symbol | float:
        if isinstance(arg, float) or arg in numbers:
            return numbers.get(arg, arg) if isinstance(arg, str) else arg
        if arg == "lr" and rate != 1.0:
            return tracer.emit("mul", Symbol(tracer, "lr"), rate)
        if arg not in made:
            return Symbol(tracer, arg)
        if arg not in known:
            op, args = made[arg].op, made[arg].args
            if op == "where" and isinstance(condition := value(args[0]), float):
                known[arg] = value(args[1] if condition else args[2])
            else:
                known[arg] = emitted(op, [value(a) for a in args])
        return known[arg]

    def emitted(op: str, args: list[Symbol | float]) -> Symbol | float:
        literals = [arg for arg in args if isinstance(arg, float)]
        if op in OPS and len(literals) == len(args):
            return OPS[op].scalar(*literals)
        if isinstance(args[0], float):  # literals come last, where order is all the same
            flipped = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}.get(op, op)
            if flipped != op or op in ("maximum", "minimum", "mul"):
                op, args = flipped, args[::-1]
        return tracer.emit(op, *args)

    outputs = [repr(tracer.arg(value(out))) for out in program.outputs]
    return [*((s.target, s.op, *map(repr, s.args)) for s in tracer.statements), tuple(outputs)]


def load(genome: Genome, path: Path) -> ElementwiseRule:
    rule = resolve_rule(f"{write_rule_file(genome, path, 'Found')}:Found")
    assert isinstance(rule, ElementwiseRule)
    return rule


def assert_the_same(rule: ElementwiseRule, genome: Genome) -> None:
    program = genome.program()
    numbers = {name: value for name, value in flat_hp(rule.hp).items() if name != "lr"}
    rate = float(rule.hp.get("lr", 1.0))
    assert rule.slots == genome.slots
    assert canonical(rule.program, numbers, rate) == canonical(program, {})


@pytest.mark.parametrize("name", CHAMPIONS)
def test_the_file_is_the_candidate(name: str, tmp_path: Path) -> None:
    assert_the_same(load(CHAMPIONS[name], tmp_path / "rule.py"), CHAMPIONS[name])


@pytest.mark.parametrize("zero", ["negative(0.0)", "mul(0.0, -1.0)"])
def test_a_negative_zero_keeps_its_sign(zero: str, tmp_path: Path) -> None:
    """Python reads ``-0`` as the integer 0."""
    text = (
        f"def train(w, g, lr):\n    z = {zero}\n    x = exact_div(g, z)\n    update = mul(x, lr)\n    return update\n"
    )
    assert_the_same(load(parse(text), tmp_path / "rule.py"), parse(text))


def test_random_candidates_in_files_are_themselves(tmp_path: Path) -> None:
    refused = 0
    for k, genome in enumerate(RANDOM):
        try:
            rule = load(genome, tmp_path / f"rule{k}.py")
        except GenomeError as error:
            assert "which never changes" in str(error)
            refused += 1
        else:
            assert_the_same(rule, genome)
    assert refused <= 2
    ruff = [sys.executable, "-m", "ruff"]
    line = ["--line-length", "120", "--isolated"]
    subprocess.run([*ruff, "format", "--check", *line, tmp_path], check=True, capture_output=True)
    subprocess.run([*ruff, "check", "--select", "E,F,I,UP,B,SIM", *line, tmp_path], check=True, capture_output=True)


def test_numbers_that_readers_know_are_hyperparameters(tmp_path: Path) -> None:
    hp = {name: load(genome, tmp_path / f"{name}.py").hp for name, genome in CHAMPIONS.items()}
    assert hp["adamw"] == {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01}
    assert hp["lion"] == {"lr": 0.0001, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    assert hp["rmsprop"] == {"lr": 0.001, "beta1": 0.99}
    assert hp["momentum"] == {"lr": 0.1, "beta1": 0.9}
    assert hp["lamb"] == {"lr": 0.001, "beta1": 0.9, "beta2": 0.999}


def test_a_rate_that_is_used_otherwise_keeps_its_place(tmp_path: Path) -> None:
    genome = parse(
        "def f(w, g, lr):\n    a = sqrt(lr)\n    b = mul(lr, 0.1)\n    a = mul(a, b)\n"
        "    update = mul(g, a)\n    return update\n"
    )
    rule = load(genome, tmp_path / "rule.py")
    assert rule.hp == {"lr": 1.0}
    assert_the_same(rule, genome)


def test_a_rule_over_the_tree_steps_and_is_exported(tmp_path: Path) -> None:
    genome = parse(
        "def f(w, g, m, lr):\n    g = clip_by_global_norm(g, 1.0)\n    m = interpolate(g, m, 0.5)\n"
        "    lr = mul(lr, 0.1)\n    update = mul(m, lr)\n    return update, m\n"
    )
    rule = load(genome, tmp_path / "clipped.py")
    module = write_module(rule, "Clipped", tmp_path / "exported.py")
    namespace: dict[str, object] = {"__name__": "exported"}
    exec(module.read_text(), namespace)
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    for make in (lambda params: optimizer(rule, params), namespace["Clipped"]):
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
        made = make(params)  # type: ignore[operator]
        for _ in range(2):
            for param, grad in zip(params, gradients, strict=True):
                param.grad = grad.clone()
            made.step()
        # m is 1/2, then 3/4 of the gradient of length 1
        for param, grad in zip(params, gradients, strict=True):
            torch.testing.assert_close(param.detach(), -0.1 * 1.25 * grad / 5, rtol=1e-6, atol=0)


def test_names_and_numbers_that_no_rule_can_have_are_refused() -> None:
    with pytest.raises(GenomeError, match="name must be an identifier such as 'MyRule', got 'a b'"):
        rule_source(CHAMPIONS["lion"], "a b")
    with pytest.raises(GenomeError, match="a rule's numbers are lr and t, got 'speed'"):
        rule_source(parse("def f(w, g, speed):\n    update = mul(g, speed)\n    return update\n"), "Found")
    with pytest.raises(GenomeError, match="which never changes; simplify the program first"):
        rule_source(
            parse(
                "def f(w, g, lr):\n    a = where(1.0, lr, g)\n    b = mean(a)\n    update = mul(g, b)\n    return update\n"
            ),
            "Found",
        )
