"""Losses from text: Python as language models write it for a trainer, and JSON statements."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_vectors import GOLDEN

from metaopt.objective import LOG_PROBABILITIES
from metaopt.program import (
    Program,
    ProgramObjective,
    ProgramTextError,
    evaluate,
    loss_statements_schema,
    parse_loss,
    parse_program,
    read_loss,
    read_rule_statements,
    rule_statements_schema,
)
from metaopt.program.parse import LONGEST_LOSS
from metaopt.program.source import function_source

BETA = 0.05
ARGUMENTS = ", ".join(f"{name}: torch.FloatTensor" for name in LOG_PROBABILITIES)
BODIES = {
    "hinge": "return torch.relu(1 - self.beta * rho)",
    "ipo": "return (rho - 1 / (2 * self.beta)) ** 2",
    "cell": "w = 0.5\nreturn w * torch.exp(-self.beta * rho) + (1 - w) * -F.logsigmoid(self.beta * rho)",
    "lrml": "s = torch.sigmoid(self.beta * rho / 0.05)\n"
    "return -F.logsigmoid(self.beta * rho) * (1 - s) + s * torch.exp(-self.beta * rho)",
    "padll": "import torch.nn.functional as F\nwrong = (rho < 0).float()  # at the β of the paper\n"
    "return 0.9 * (1 - 0.5 * wrong) * -F.logsigmoid(self.beta * rho)",
    "pfl": "z = rho * self.beta\nright = policy_chosen_logps > policy_rejected_logps\n"
    "return torch.where(right, -torch.nn.functional.logsigmoid(z) / 2.0, F.relu(1 - z) * 2.0)",
    "dbaql": "z = rho * self.beta\nblend = torch.sigmoid((z / 0.05).var())\n"
    "return blend * -F.logsigmoid(z / 0.9) + (1 - blend) * (-z * 0.9).exp()",
    "aql": "z = rho * self.beta\nlevel = 0.5 + 0.01 * (torch.sigmoid((z / 0.05).mean()) - 0.5)\n"
    "w = torch.sigmoid(-(z / 0.05 - level))\nreturn w * -F.logsigmoid(z) + (1 - w) * torch.relu(1 - z)",
    "aqfl": "z = rho * self.beta\nlevel = (z / 0.05).std() * torch.sigmoid(-z / 0.05).mean()\n"
    "level += 0.05 * (torch.sigmoid((z / 0.05).mean()) - level)\n"
    "w = torch.sigmoid(0.1 * (z / 0.05 - level).abs())\nreturn w * -F.logsigmoid(z) + (1 - w) * torch.relu(1 - z)",
}
"""The formulas of DiscoPOP's losses (Lu et al., 2024, appendix E, and what it starts from) as one may write them."""


def text_of(body: str, arguments: str = f"self, {ARGUMENTS}") -> str:
    ratio = "rho = policy_chosen_logps - policy_rejected_logps - (reference_chosen_logps - reference_rejected_logps)\n"
    lines = "".join(f"    {line}\n" for line in (ratio + body).splitlines())
    return f'def loss({arguments}) -> torch.FloatTensor:\n    """A loss."""\n{lines}'


def parsed(body: str) -> Program:
    return parse_loss(text_of(body), LOG_PROBABILITIES, ["beta"])


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 20 * torch.randn(7, generator=generator, dtype=torch.float64) for name in LOG_PROBABILITIES}


def value_and_gradients(loss: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    value = loss(leaves)
    weights = torch.linspace(0.5, 2, len(value), dtype=value.dtype)
    return [value, *torch.autograd.grad(value, list(leaves.values()), weights)]


@pytest.mark.parametrize("name", BODIES)
def test_what_is_read_is_what_torch_computes(name: str) -> None:
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(text_of(BODIES[name]).replace(".float()", ".double()"), names)  # as exact as the inputs
    program = parsed(BODIES[name])
    expected = value_and_gradients(lambda x: names["loss"](SimpleNamespace(beta=BETA), **x), batch())
    found = value_and_gradients(lambda x: evaluate(program, x, {"beta": BETA})[0], batch())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["hinge", "ipo", "cell", "lrml", "padll"])
def test_published_losses_have_their_values_and_derivatives(name: str) -> None:
    golden = np.load(GOLDEN / "preference_losses.npz")
    rho = torch.from_numpy(golden["rho"])
    inputs = {name: torch.zeros_like(rho) for name in LOG_PROBABILITIES} | {"policy_chosen_logps": rho.requires_grad_()}
    (loss,) = evaluate(parsed(BODIES[name]), inputs, {"beta": BETA})
    (gradient,) = torch.autograd.grad(loss.sum(), rho)
    np.testing.assert_allclose(loss.detach(), golden[f"value/{name}"], rtol=1e-12, atol=1e-14)
    smooth = golden["rho"] != 0 if name == "padll" else golden["rho"] == golden["rho"]
    np.testing.assert_allclose(gradient[smooth], golden[f"grad/{name}"][smooth], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", BODIES)
def test_what_is_printed_comes_back(name: str) -> None:
    printed = function_source(parsed(BODIES[name]), "loss")
    assert function_source(parse_loss(printed, LOG_PROBABILITIES, ["beta"]), "loss") == printed


@pytest.mark.parametrize(
    "body, message",
    [
        ("return -F.logsigmoid(self.beta * rho) * (1 - self.label_smoothing)", "self has beta, not 'label_smoothing'"),
        ("return torch.cat((1 - rho, rho), 0)", "is no arithmetic"),
        ("losses = rho\nreturn losses, rho.detach(), rho", "return the loss alone"),
        ("if self.loss_type == 'a':\n    return rho\nreturn rho", "no assignment"),
        ("return rho.mean()", "one number for the whole batch; return one per example"),
        ("return self.beta * 2", "one number for the whole batch"),
        ("return rho.softmax(0)", "softmax is not elementwise arithmetic"),
        ("return rho.std(0)", "std of a loss is of the whole batch"),
        ("return rho.detach()", "detach is not elementwise arithmetic"),
        ("return other", "'other' is used before it is assigned"),
        ("return rho[0]", "is no arithmetic"),
        ("return orthogonalise(rho)", "is of matrices"),
        ("return F.dropout(rho)", "dropout is not elementwise arithmetic"),
        ("from os import system\nreturn rho", "no assignment"),
        ("return self", "'self' is used before it is assigned"),
        ("return rho.mean().mean()", "mean in"),
    ],
)
def test_refusals_name_the_way_out(body: str, message: str) -> None:
    with pytest.raises(ProgramTextError, match=message):
        parsed(body)


def test_published_losses_outside_the_language_are_refused() -> None:
    """Four of the thirteen that DiscoPOP's trainer has: label smoothing, two batches in one (twice), a switch."""
    for body in (
        "return -F.logsigmoid(rho) * (1 - self.label_smoothing) - F.logsigmoid(-rho) * self.label_smoothing",
        "kl = policy_chosen_logps.mean().clamp(min=0)\nreturn torch.cat((1 - F.sigmoid(rho - kl), 1 - F.sigmoid(kl - rho)), 0)",
        "delta = torch.cat((rho, -rho), dim=0).mean().detach()\nreturn -F.logsigmoid(rho - delta) - F.logsigmoid(-rho - delta)",
        "return self.hinge(rho)",
    ):
        with pytest.raises(ProgramTextError):
            parsed(body)


def test_a_program_of_a_text_is_an_objective() -> None:
    objective = ProgramObjective(code=parsed(BODIES["aql"]), numbers=(("beta", BETA),))
    torch.testing.assert_close(objective(batch()), evaluate(objective.code, batch(), {"beta": BETA})[0])
    assert objective.batch_dependent


def test_arguments_are_taken_by_name() -> None:
    program = parse_loss("def f(beta, rho):\n    return torch.exp(-beta * rho)\n", ["rho", "unused"], ["beta", "tau"])
    assert (program.tensors, program.scalars) == (("rho", "unused"), ("beta", "tau"))
    with pytest.raises(ProgramTextError, match="there is no input 'x'; there are rho, beta"):
        parse_loss("def f(x):\n    return x\n", ["rho"], ["beta"])


def test_long_and_deep_losses_are_refused() -> None:
    longest = text_of("return rho").ljust(LONGEST_LOSS)
    parse_loss(longest, LOG_PROBABILITIES, ["beta"])
    with pytest.raises(ProgramTextError, match="may have 4096 characters, got 4097"):
        parse_loss(longest + " ", LOG_PROBABILITIES, ["beta"])
    parsed(f"return {'(' * 24}rho{')' * 24}")
    with pytest.raises(ProgramTextError, match="24 deep"):
        parsed(f"return {'(' * 25}rho{')' * 25}")


@pytest.mark.parametrize("name", ["ｅxp", "ﬁ", "x²"])
def test_names_that_python_reads_as_others_are_refused(name: str) -> None:
    with pytest.raises(ProgramTextError):
        parse_program(f"def f(param, grad):\n    return param.{name}()\n")
    assert parse_program(f"def f(param, grad):\n    # {name}\n    β = param\n    return β\n").outputs == ("param",)


# -- statements --------------------------------------------------------------------------------------------------------


def statement(target: str, function: str, *operands: object) -> dict[str, object]:
    padded = [*operands, None, None, None]
    return {"o": target, "f": function, "a": padded[0], "b": padded[1], "c": padded[2]}


DPO = [
    statement("x1", "mul", "rho", "beta"),
    statement("x1", "logsigmoid", "x1"),
    statement("loss", "neg", "x1"),
]


def test_statements_are_the_same_loss_as_python() -> None:
    python = read_loss("def f(rho, beta):\n    return -F.logsigmoid(rho * beta)\n", ["rho"], ["beta"])
    rho = {"rho": torch.linspace(-50, 50, 11, dtype=torch.float64)}
    for text in (json.dumps(DPO), json.dumps({"thought": "the baseline", "name": "dpo", "program": DPO})):
        statements = read_loss(text, ["rho"], ["beta"])
        torch.testing.assert_close(evaluate(statements, rho, {"beta": 0.1}), evaluate(python, rho, {"beta": 0.1}))


def test_statements_of_a_rule() -> None:
    lion = [
        statement("x1", "sub", "m", "grad"),
        statement("x1", "mul", "x1", 0.9),
        statement("x1", "add", "x1", "grad"),
        statement("x1", "sign", "x1"),
        statement("x1", "mul", "x1", "lr"),
        statement("param", "sub", "param", "x1"),
        statement("x2", "sub", "m", "grad"),
        statement("x2", "mul", "x2", 0.99),
        statement("m", "add", "x2", "grad"),
    ]
    jsonschema.validate(lion, rule_statements_schema(["m"], ["lr"]))
    program = read_rule_statements(json.dumps(lion), ["m"], ["lr"])
    tensors = {
        name: torch.tensor(x) for name, x in {"param": [1.0, 2.0], "grad": [0.5, -1.0], "m": [-1.0, 0.0]}.items()
    }
    param, m = evaluate(program, tensors, {"lr": 0.1})
    torch.testing.assert_close(param, torch.tensor([1.1, 2.1]))
    torch.testing.assert_close(m, torch.tensor([-0.985, -0.01]))


def test_the_schema_takes_what_is_read() -> None:
    schema = loss_statements_schema(["rho"], ["beta"])
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(DPO, schema)
    for wrong in ([], [statement("loss", "system", "rho")], [statement("loss", "neg", "chosen")], [{"o": "loss"}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    "statements, message",
    [
        ([], "a list of 1 to 64 statements"),
        ([statement("loss", "neg", "rho")] * 65, "a list of 1 to 64 statements"),
        (["loss"], "statement 1: a statement is"),
        ([{**statement("loss", "neg", "rho"), "code": "os"}], "statement 1: a statement is"),
        ([statement("__class__", "neg", "rho")], "'__class__' is no name"),
        ([statement("ｅ", "neg", "rho")], "is no name"),
        ([statement("loss", "system", "rho")], "there is no function 'system'; there are abs"),
        ([statement("loss", "neg", "other")], "'other' is used before it is assigned; there are rho, beta"),
        ([statement("loss", "neg", "rho", "rho")], "neg takes 1 operands: a"),
        ([statement("loss", "add", "rho")], "add takes 2 operands: a, b"),
        ([statement("loss", "neg", True)], "neither a name nor a finite number"),
        ([statement("loss", "neg", ["rho"])], "neither a name nor a finite number"),
        ([statement("loss", "neg", 10**400)], "neither a name nor a finite number"),
        ([statement("x1", "neg", "rho")], "no statement assigns the result"),
        ([statement("loss", "mean", "rho")], "one number for the whole batch"),
    ],
)
def test_other_statements_are_refused(statements: list[Any], message: str) -> None:
    with pytest.raises(ProgramTextError, match=message):
        read_loss(json.dumps(statements), ["rho"], ["beta"])


@pytest.mark.parametrize("text", ["[" * 100_000, "[1,", '{"program": 1}', "[NaN]", "[" + " " * 20_000])
def test_texts_that_are_no_statements_are_refused(text: str) -> None:
    with pytest.raises(ProgramTextError):
        read_loss(text, ["rho"], ["beta"])
