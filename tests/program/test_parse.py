"""Programs from text, which is never executed."""

from __future__ import annotations

import textwrap

import pytest
import torch
from rule_strategies import ELEMENTWISE

from metaopt.program import Program, ProgramTextError, Statement, evaluate, evaluate_tree, parse_program, python_source
from metaopt.program.parse import DEEPEST, LONGEST
from metaopt.program.source import function_source


def parsed(body: str, arguments: str = "param, grad, m, *, lr") -> Program:
    return parse_program(f"def update({arguments}):\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n")


def stepped(program: Program) -> list[torch.Tensor]:
    tensors = {"param": torch.tensor([1.0, -2.0, 0.5]), "grad": torch.tensor([0.3, -0.1, 2.0])}
    tensors |= {slot: torch.tensor([-1.0, 4.0, 0.0]) for slot in program.tensors[2:]}
    return evaluate(program, tensors, {"lr": 0.1, "beta": 0.9, "t": 3.0})


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_is_printed_comes_back(name: str) -> None:
    program = ELEMENTWISE[name].program
    one, two = function_source(program, "update"), python_source(program)
    assert function_source(parse_program(one), "update") == one
    assert python_source(parse_program(two)) == two


def test_rules_as_people_write_them() -> None:
    program = parse_program(
        '''
import torch
import math

def my_rule(w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, lr: float, beta: float):
    """Lion with a twist."""
    a, b = 0.5, 2.0
    direction = torch.sign(torch.lerp(g, m, beta))
    m *= beta
    m += (1 - beta) * g
    norm: float = g.norm()
    if_large = torch.where(norm > 1, g / norm, g)
    rate = lr * math.sqrt(0.25) if lr < 1 else max(lr, a)
    w = w - rate * direction.abs().clamp(max=1.0) * direction * b * a
    w -= 0.0 * if_large
    return w, m
'''
    )
    assert program.tensors == ("param", "grad", "m")
    assert program.scalars == ("lr", "beta")
    param, m = stepped(program)
    direction = torch.sign(torch.tensor([0.3 + 0.9 * -1.3, -0.1 + 0.9 * 4.1, 0.2]))
    torch.testing.assert_close(param, torch.tensor([1.0, -2.0, 0.5]) - 0.05 * direction)
    torch.testing.assert_close(m, 0.9 * torch.tensor([-1.0, 4.0, 0.0]) + 0.1 * torch.tensor([0.3, -0.1, 2.0]))


def test_reductions_over_the_tree() -> None:
    program = parsed("return param - lr * grad / global_norm(grad), m + global_sum(torch.abs(m))")
    assert program.reach == "tree"
    assert "global_norm(grad)" in function_source(program, "update")
    leaf = {"param": torch.zeros(1), "grad": torch.tensor([3.0]), "m": torch.tensor([-1.0])}
    other = {"param": torch.zeros(1), "grad": torch.tensor([4.0]), "m": torch.tensor([2.0])}
    (param, m), _ = evaluate_tree(program, [leaf, other], {"lr": 1.0})
    assert (param.item(), m.item()) == (pytest.approx(-0.6), 2.0)


def test_both_zeros_stay_apart() -> None:
    program = parsed("return grad / 0.0, grad / -0.0")
    assert [s.args for s in program.statements] == [("grad", 0.0), ("grad", -0.0)]
    assert len(program.statements) == 2
    assert "-0.0" in function_source(program, "update")


def test_a_slot_may_have_the_name_of_a_statement() -> None:
    program = parsed("v1 = grad * v0\nreturn param - v1 * v1, v1", "param, grad, v0, *, lr")
    assert stepped(program)[1].tolist() == pytest.approx([-0.3, -0.4, 0.0])


def test_zeros_are_zeros_also_of_nan() -> None:
    program = parsed("return param, torch.zeros_like(grad) + torch.ones_like(m)")
    nan = torch.full((2,), torch.nan)
    assert evaluate(program, {"param": nan, "grad": nan, "m": nan}, {"lr": 0.1})[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return param", "line 1: 3 tensors have 2 new values, all but the gradient; the function returns 1"),
        ("x = y\nreturn param, m", "line 2: 'y' is used before it is assigned; there are lr, param, grad, m"),
        ("for x in m:\n    pass\nreturn param, m", "line 2: 'for x in m:.*is no assignment"),
        ("if lr > 1:\n    m = grad\nreturn param, m", "is no assignment; a program has no branches, loops or calls"),
        ("m.mul_(2)\nreturn param, m", "is no assignment"),
        ("m = m.mul_(2)\nreturn param, m", "line 2: mul_ works in place"),
        ("m = torch.fft.fft(m)\nreturn param, m", "line 2: fft_fft is not elementwise arithmetic"),
        ("m = torch.clamp(m, low=1)\nreturn param, m", "line 2: clamp takes no low="),
        ("m = torch.square(m, 2)\nreturn param, m", "line 2: square takes 1 arguments, got 2"),
        ("m = torch.sqrt()\nreturn param, m", "line 2: sqrt takes 1 arguments, got 0"),
        ("m = max(m, 0)\nreturn param, m", "line 2: max is of numbers, and .* has tensors; use torch.maximum"),
        ("m = grad if m > 0 else m\nreturn param, m", "line 2: a branch is of numbers, and 'm > 0' has tensors"),
        ("m = math.sqrt(m)\nreturn param, m", "use torch.sqrt"),
        ("m = m @ grad\nreturn param, m", "line 2: 'm @ grad': the operators are"),
        ("m = m == grad\nreturn param, m", "line 2: 'm == grad' is no arithmetic"),
        ("m[0] = grad\nreturn param, m", "line 2: 'm\\[0\\]' cannot be assigned"),
        ("torch = grad\nreturn param, m", "line 2: 'torch' has a meaning here"),
        ("m = m * 1" + "0" * 400 + "\nreturn param, m", "line 2: the number is larger than floats are"),
        ("m = m.mean().norm()\nreturn param, m", "norm in .* is of .*, which has one value per tensor already"),
        ("m = torch.lerp(m, grad, **lr)\nreturn param, m", "line 2: arguments with stars are not read"),
        ("return lambda: m, m", "is no arithmetic"),
        ("x = 1", "a program ends with a return"),
    ],
)
def test_errors_say_where_and_what_to_do(body: str, message: str) -> None:
    with pytest.raises(ProgramTextError, match=message):
        parsed(body)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("param, grad, m, m, *, lr", "two arguments are called 'm'"),
        ("param, grad, param, *, lr", "two arguments are called 'param'"),
        ("w, g, param, *, lr", "no slot or number may be called 'param'"),
        ("param, grad, step, *, lr", "no slot or number may be called 'step'"),
        ("param, grad, m, *, lr=print(1)", "without decorators, defaults"),
        ("param, grad, m=2, *, lr", "without decorators, defaults"),
        ("*param", "without decorators, defaults"),
        ("param, grad, torch, *, lr", "'torch' has a meaning here"),
    ],
)
def test_arguments_are_plain(arguments: str, message: str) -> None:
    with pytest.raises(ProgramTextError, match=message):
        parsed("return param, grad", arguments)


@pytest.mark.parametrize(
    "attack",
    [
        "x = __import__('os').system('false')",
        "x = torch.os.system('false')",
        "x = torch.sys.modules",
        "x = ().__class__.__base__.__subclasses__()",
        "x = grad.__class__",
        "x = grad.__dir__()",
        "x = '{0.__class__}'.format(grad)",
        "x = f'{grad}'",
        "x = [y for y in grad]",
        "x = (y := grad)",
        "x = torch.load('file')",
        "x = grad.to('cuda')",
        "x = grad.register_hook(print)",
        "x = print(grad)",
        "x = _import(grad)",
        "x = lr.__pow__(2)",
        "import os",
        "global x",
        "x = 9 ** 9 ** 9 ** 9 ** True",
        "match grad:\n    case object(__class__=c): pass",
    ],
)
def test_attacks_are_refused(attack: str) -> None:
    with pytest.raises(ProgramTextError):
        parsed(f"{attack}\nreturn param, m")
    with pytest.raises(ProgramTextError):
        parse_program(f"{attack}\ndef update(param, grad):\n    return param\n")


def test_nothing_is_executed(capsys: pytest.CaptureFixture[str]) -> None:
    parse_program(
        "def update(param: print('note'), grad) -> print('this'):\n    x: print('now') = grad\n    return x\n"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text",
    [
        "x" * (LONGEST + 1),
        "(" * (DEEPEST + 1),
        "-" * 90_000 + "1",
        "not " * 20_000 + "1",
        "1" + " + 1" * 20_000,
        "x" + ".a" * 40_000,
        "\0",
        "def",
        "def f(\ud800): pass",
        "1" * 5000,
    ],
)
def test_texts_that_would_hang_or_crash_a_parser_are_refused(text: str) -> None:
    for whole in (text, f"def f(param, grad):\n    x = {text}\n    return x\n"):
        with pytest.raises(ProgramTextError):
            parse_program(whole)


def test_names_of_a_text_are_those_of_its_program() -> None:
    program = parsed("mixed = 0.9 * m + 0.1 * grad\nm = mixed\nstep = torch.sign(mixed)\nreturn param - lr * step, m")
    assert [s.target for s in program.statements if s.target.isalpha()] == ["mixed", "step"]
    assert Statement("step", "sign", ("mixed",)) in program.statements
