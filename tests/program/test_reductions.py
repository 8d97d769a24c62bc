"""Numbers of whole tensors and trees in programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.program import Program, Statement, evaluate, evaluate_tree, parse_program
from metaopt.program.source import function_source


def scaled_by(op: str) -> Program:
    """param - c * grad / (1 + op(grad))."""
    statements = (
        Statement("size", op, ("grad",)),
        Statement("divisor", "add", (1.0, "size")),
        Statement("step", "div", ("grad", "divisor")),
        Statement("scaled", "mul", ("c", "step")),
        Statement("new", "sub", ("param", "scaled")),
    )
    return Program(("c",), ("param", "grad", "slot"), statements, ("new", "size"))


def tree(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=generator, dtype=dtype) for name in ("param", "grad", "slot")}
        for shape in ((3, 2), (), (5,))
    ]


@pytest.mark.parametrize("op", ["mean", "norm", "global_sum", "global_norm"])
def test_reductions_are_those_of_torch(op: str) -> None:
    leaves = tree()
    whole = torch.cat([leaf["grad"].flatten() for leaf in leaves])
    for leaf, (param, slot) in zip(leaves, evaluate_tree(scaled_by(op), leaves, {"c": 0.1}), strict=True):
        grad = leaf["grad"]
        sizes = {
            "mean": grad.mean(), "norm": grad.norm(), "global_sum": whole.sum(), "global_norm": whole.norm()
        }  # fmt: skip
        assert slot.shape == grad.shape
        torch.testing.assert_close(slot, sizes[op].expand_as(grad), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(param, leaf["param"] - 0.1 * grad / (1 + sizes[op]), rtol=1e-14, atol=1e-14)


def test_a_tensor_alone_is_its_own_tree_and_copies_vmap() -> None:
    leaf = tree()[0]
    alone = evaluate(scaled_by("global_norm"), leaf, {"c": 0.1})
    torch.testing.assert_close(alone, evaluate(scaled_by("norm"), leaf, {"c": 0.1}), rtol=0, atol=0)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in leaf.items()}
    both = torch.func.vmap(lambda tensors: evaluate(scaled_by("norm"), tensors, {"c": 0.1}))(stacked)
    torch.testing.assert_close([value[0] for value in both], alone, rtol=1e-15, atol=0)


def test_norms_of_zero_have_derivative_zero() -> None:
    leaf = {name: torch.zeros(3, dtype=torch.float64) for name in ("param", "grad", "slot")}
    leaf["grad"].requires_grad_()
    (derivative,) = torch.autograd.grad(evaluate(scaled_by("norm"), leaf, {"c": 0.1})[1].sum(), leaf["grad"])
    assert torch.equal(derivative, torch.zeros(3, dtype=torch.float64))


def test_how_far_a_program_looks() -> None:
    assert [scaled_by(op).reach for op in ("norm", "mean", "global_sum", "abs")] == [
        "tensor",
        "tensor",
        "tree",
        "element",
    ]


def test_what_has_one_value_cannot_be_reduced() -> None:
    statements = (Statement("size", "norm", ("grad",)), Statement("again", "mean", ("size",)))
    with pytest.raises(ValueError, match="mean in again is of 'size', which has one value per tensor already"):
        Program((), ("param", "grad"), statements, ("param",))


def test_a_condition_between_a_number_of_the_tensor_and_elements_gives_elements() -> None:
    statements = (Statement("middle", "mean", ("grad",)), Statement("new", "where", ("t", "middle", "param")))
    program = Program(("t",), ("param", "grad"), statements, ("new",))
    text = f"import torch\n{function_source(program, 'update')}"
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    param, grad = torch.zeros(3), torch.arange(3.0)
    for t in (0.0, 1.0):
        torch.testing.assert_close(namespace["update"](param, grad, t=t), torch.full((3,), t))
    assert parse_program(text) == program
