"""A rule's text becomes a program, or a sentence that says what to write instead."""

from __future__ import annotations

import cProfile
import pstats
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.program import TraceError, python_source, trace, where
from metaopt.program.trace import TRACEABLE
from metaopt.rule import ElementwiseRule
from metaopt.space import hyper, learning_rate, option


class Base(ElementwiseRule):
    lr: float = learning_rate(0.1, search=(0.01, 1.0))
    betas: tuple[float, float] = hyper((0.9, 0.99), 0.0, 1.0)
    flag: bool = option(False, choices=(False, True))
    slots = ("memory",)

    def elementwise(self, param: Any, grad: Any, memory: Any, lr: Any, beta1: Any, beta2: Any) -> Any:
        memory = beta1 * memory + (1 - beta1) * grad
        direction = memory.sign() if self.flag else memory
        return param - lr * direction, memory


def variant(elementwise: Any, slots: Any = ("memory",)) -> ElementwiseRule:
    return type("Variant", (Base,), {"elementwise": elementwise, "slots": slots})()


def test_scalar_arithmetic_is_hoisted_out_of_the_kernel_and_names_are_kept() -> None:
    program = trace(Base())
    assert [s.target for s in program.prelude] == ["one_minus_beta1"]
    assert program.coefficients == ("lr", "beta1", "one_minus_beta1")
    assert "new_memory = beta1 * memory + one_minus_beta1 * grad" in python_source(program)


def test_a_profiler_goes_on_after_a_trace() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    trace(Base())
    len(python_source(trace(Base())))
    profiler.disable()
    assert "python_source" in {name for _, _, name in pstats.Stats(profiler).stats}  # type: ignore[attr-defined]


def test_options_shape_the_program_and_hyperparameters_do_not() -> None:
    assert trace(Base(lr=0.5)) == trace(Base())
    assert trace(Base(flag=True)) != trace(Base())
    assert Base().program == trace(Base())
    assert Base().replaced(flag=True).program == trace(Base(flag=True))


def test_where_branches_on_the_step_count_in_every_world() -> None:
    class Switch(Base):
        def coefficients(self, hp: Any, t: Any) -> dict[str, Any]:
            return {"rate": where(t > 2, hp["lr"], 0.0)}

        def elementwise(self, param: Any, grad: Any, memory: Any, rate: Any) -> Any:  # type: ignore[override]
            return param - rate * grad, memory

    for t in (1, 2, 3, 4):
        assert trace(Switch()).scalar_values({"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "t": t}) == {
            "rate": 0.1 if t > 2 else 0.0
        }


def test_common_subexpressions_are_computed_once_and_dead_ones_never() -> None:
    def text(self: Any, param: Any, grad: Any, memory: Any, lr: Any, beta1: Any, beta2: Any) -> Any:
        unused = torch.exp(grad)
        return param - lr * (grad * grad) + lr * (grad * grad), memory, unused

    def two(self: Any, *arguments: Any, **coefficients: Any) -> Any:
        return text(self, *arguments, **coefficients)[:2]

    operations = [s.op for s in trace(variant(two)).statements]
    assert operations == ["mul", "mul", "sub", "add"]


@pytest.mark.parametrize(
    ("elementwise", "message"),
    [
        (
            lambda self, param, grad, memory, **c: (param.mean(0), memory),
            r"mean takes no dim=0 .* x\.norm\(\) and x\.mean\(\)",
        ),
        (lambda self, param, grad, memory, **c: (param - grad.norm(p=1), memory), r"norm takes no p=1 in"),
        (lambda self, param, grad, memory, lr, **c: (param - grad.norm(p=lr), memory), r"norm takes no p=<symbol lr>"),
        (lambda self, param, grad, memory, **c: (grad.norm(*range(6)), memory), "norm takes one value"),
        (lambda self, param, grad, memory, **c: (param - grad.sum(dim=0), memory), r"sum is not .* global_sum\(x\)"),
        (lambda self, param, grad, memory, **c: (param / grad.numel(), memory), "numel is not elementwise arithmetic"),
        (lambda self, param, grad, memory, **c: (param / grad.shape[0], memory), "shape is not elementwise arithmetic"),
        (lambda self, param, grad, memory, **c: (param, memory[0]), r"does the same to all; write x = torch\.where"),
        (lambda self, param, grad, memory, **c: memory.__setitem__(0, 0.0), "takes elements apart"),
        (lambda self, param, grad, memory, **c: (torch.where(grad == 0, param, grad), memory), "has no =="),
        (
            lambda self, param, grad, memory, **c: (torch.div(param, grad, rounding_mode="floor"), memory),
            "div takes no rounding_mode=",
        ),
        (lambda self, param, grad, memory, **c: (param.cumsum(0), memory), "cumsum is not elementwise arithmetic"),
        (lambda self, param, grad, memory, **c: (param if grad > 0 else grad, memory), "write torch.where"),
        (lambda self, param, grad, memory, **c: (param - self.lr * grad, memory), "take lr as an argument"),
        (lambda self, param, grad, memory, **c: param, r"must return \(new_param, new_memory\), got 1 values"),
        (lambda self, param, grad, memory, **c: (param - torch.ones(3), memory), "neither a number nor a traced value"),
        (lambda self, param, grad, memory, **c: (float(param), memory), "has no value while tracing"),
        (lambda self, param, grad, memory, **c: (param, memory.mul_(0.9)), "mul_ works in place"),
    ],
)
def test_what_is_no_elementwise_text_is_refused_with_the_way_out(elementwise: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(variant(elementwise))


def test_an_error_names_the_line_of_the_rule() -> None:
    def text(self: Any, param: Any, grad: Any, memory: Any, **coefficients: Any) -> Any:
        memory = memory + grad
        return (param if grad > 0 else grad), memory

    line = text.__code__.co_firstlineno + 2
    with pytest.raises(TraceError, match=rf"^Variant, line {line} of test_trace\.py: a branch .* write torch\.where"):
        trace(variant(text))


@pytest.mark.parametrize(
    "norm",
    [
        torch.norm, torch.linalg.vector_norm, lambda x: x.norm(), lambda x: x.norm(2), lambda x: x.norm(p=2.0),
        lambda x: torch.norm(x, p="fro"), lambda x: torch.linalg.vector_norm(x, ord=2, dim=None),
    ],
)  # fmt: skip
def test_the_euclidean_norm_of_a_tensor_has_many_spellings(norm: Any) -> None:
    def text(self: Any, param: Any, grad: Any, memory: Any, **coefficients: Any) -> Any:
        return param / norm(grad), memory

    assert [s.op for s in trace(variant(text)).statements] == ["norm", "div"]


def test_the_architecture_page_names_what_can_be_traced() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf-8")
    (listed,) = re.findall(r"these names of torch:([^.]*)\.", page)
    assert tuple(re.findall(r"`(\w+)`", listed)) == TRACEABLE


@pytest.mark.parametrize("slots", ["memory", ("step",), ("lr",), ("a b",), ("memory", "memory"), ["memory"]])
def test_slots_must_be_a_tuple_of_free_names(slots: Any) -> None:
    with pytest.raises(TraceError, match="slot"):
        trace(variant(Base.elementwise, slots))


def test_a_hyperparameter_without_a_type_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Untyped\.lr needs a type; write lr: float"):

        class Untyped(Base):
            lr = learning_rate(0.1, search=(0.01, 1.0))
