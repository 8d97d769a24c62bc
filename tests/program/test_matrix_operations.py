"""Functions of a tensor as a matrix: what they compute, and that every execution has them or refuses them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metaopt
from metaopt.export import write_module
from metaopt.matrix import QUINTIC, column_count, column_mean, orthogonalise, row_count, row_mean
from metaopt.program import (
    MATRIX_OPS,
    Program,
    Statement,
    compile_cpp,
    compile_in_place,
    evaluate,
    evaluate_tree,
    global_norm,
    parse_program,
    python_source,
)
from metaopt.program.population import PopulationStep, encode
from metaopt.rule import ElementwiseRule, UpdateRule, infer_info
from metaopt.space import hyper, learning_rate
from metaopt_classic.muon import Muon
from metaopt_classic.wrappers import Lookahead

SHAPES = {"hidden.weight": (6, 4), "conv": (2, 3, 4), "bias": (5,), "scale": ()}


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class MuonLike(ElementwiseRule):
    """Muon with Nesterov's momentum and Moonlight's scale, written in the language."""

    lr: float = learning_rate(1e-2, search=(1e-3, 1e-1))
    momentum: float = hyper(0.95, 0.0, 1.0, open_high=True, search=(0.8, 0.99))
    weight_decay: float = hyper(0.1, 0.0, search=(1e-3, 1.0))
    slots = ("buffer",)

    def elementwise(  # type: ignore[override]
        self, param: Any, grad: Any, buffer: Any, lr: Any, momentum: Any, weight_decay: Any
    ) -> Any:
        buffer = momentum * buffer + (1 - momentum) * grad
        ahead = momentum * buffer + (1 - momentum) * grad
        scale = 0.2 * torch.sqrt(torch.maximum(row_count(param), column_count(param)))
        return (1 - lr * weight_decay) * param - lr * scale * orthogonalise(ahead), buffer


class Factored(ElementwiseRule):
    """Adafactor's direction, all updates together of length lr at most."""

    lr: float = learning_rate(1e-2, search=(1e-3, 1e-1))

    def elementwise(self, param: Any, grad: Any, lr: Any) -> Any:  # type: ignore[override]
        square = grad * grad
        update = grad / torch.sqrt(row_mean(square) * column_mean(square) / square.mean())
        return param - lr * update / torch.clamp(global_norm(update), min=1.0)


RULES: dict[str, UpdateRule] = {"muon": MuonLike(), "tree": Factored(), "within": Lookahead(MuonLike(), k=2)}


def of_op(op: str) -> Program:
    return Program((), ("param", "grad"), (Statement("value", op, ("grad",)),), ("value",))


def value_of(op: str, tensor: Tensor) -> Tensor:
    (value,) = evaluate(of_op(op), {"param": tensor, "grad": tensor}, {})
    return value


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_rows_are_the_first_dimension_and_vectors_are_one_row(shape: tuple[int, ...]) -> None:
    x = normal(shape)
    matrix = x.numpy().reshape(shape[0], -1) if len(shape) > 1 else x.numpy().reshape(1, -1)
    expected = {
        "row_mean": np.broadcast_to(matrix.mean(1, keepdims=True), matrix.shape).reshape(shape),
        "column_mean": np.broadcast_to(matrix.mean(0, keepdims=True), matrix.shape).reshape(shape),
        "row_count": np.full(shape, matrix.shape[0]),
        "column_count": np.full(shape, matrix.shape[1]),
    }
    for op, value in expected.items():
        np.testing.assert_allclose(value_of(op, x), value, rtol=1e-15, atol=1e-16, err_msg=op)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_orthogonalise_moves_singular_values_by_the_quintic(shape: tuple[int, ...]) -> None:
    x = normal(shape)
    left, sizes, right = np.linalg.svd(x.numpy().reshape(shape[0] if len(shape) > 1 else 1, -1), full_matrices=False)
    sizes = sizes / (np.linalg.norm(sizes) + 1e-8)
    a, b, c = QUINTIC
    for _ in range(5):
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    # five steps multiply rounding errors by up to 3.4^5
    np.testing.assert_allclose(value_of("orthogonalise", x), ((left * sizes) @ right).reshape(shape), atol=1e-12)


def test_factored_moments_of_a_vector_are_its_own() -> None:
    """Why a vector is one row: row mean times column mean over mean is then exact, and Adafactor does not factor vectors."""
    square = normal((7,)) ** 2
    torch.testing.assert_close(row_mean(square) * column_mean(square) / square.mean(), square, rtol=1e-14, atol=0)


def test_derivatives_are_those_of_finite_differences() -> None:
    x = normal((4, 3)).requires_grad_()
    for op in ("orthogonalise", "row_mean", "column_mean"):
        assert torch.autograd.gradcheck(lambda t, op=op: value_of(op, t), x)
    (at_zero,) = torch.autograd.grad(value_of("orthogonalise", torch.zeros_like(x) * x).sum(), x)
    assert at_zero.isfinite().all()


def test_muon_in_the_language_is_the_registered_muon_on_hidden_matrices() -> None:
    params = {
        "layers.0.weight": normal((6, 4)),
        "layers.1.weight": normal((3, 8), 1),
        "conv.weight": normal((4, 2, 3, 3), 2),
    }
    info = infer_info(params, {name: "hidden" for name in params})
    rules = MuonLike(), Muon(lr=1e-2, momentum=0.95, weight_decay=0.1)
    carried = [(params, rule.init(params, info)) for rule in rules]
    for step in range(4):
        grads = {name: normal(tuple(p.shape), 10 + step) for name, p in params.items()}
        context = metaopt.rule.Context(info)
        carried = [
            rule.update(grads, state, own, rule.hp, context) for rule, (own, state) in zip(rules, carried, strict=True)
        ]
    torch.testing.assert_close(carried[0][0], carried[1][0], rtol=1e-12, atol=1e-13)


# -- executions --------------------------------------------------------------------------------------------------------


def test_how_far_a_program_looks() -> None:
    assert MuonLike().program.reach == "matrix" and MuonLike().program.matrix_ops == {
        "orthogonalise", "row_count", "column_count"
    }  # fmt: skip
    assert Factored().program.reach == "tree"
    with pytest.raises(ValueError, match="orthogonalise in again is of 'rows', which has one value per tensor already"):
        statements = (Statement("rows", "row_count", ("grad",)), Statement("again", "orthogonalise", ("rows",)))
        Program((), ("param", "grad"), statements, ("param",))


@pytest.mark.parametrize("op", MATRIX_OPS)
def test_copies_vmap(op: str) -> None:
    x = normal((3, 4, 5))
    both = torch.func.vmap(lambda one: value_of(op, one))(x)
    torch.testing.assert_close(both, torch.stack([value_of(op, one) for one in x]), rtol=1e-12, atol=1e-13)


def test_generated_steps_refuse_them() -> None:
    program, double = MuonLike().program, torch.float64
    assert compile_cpp(program, double, double, double) is None
    with pytest.raises(ValueError, match="has no step in place; run it by evaluate_tree"):
        compile_in_place(program, lists=False)


@pytest.mark.parametrize("rule", [MuonLike(), Factored()], ids=lambda rule: type(rule).__name__)
def test_source_gives_the_program_back(rule: ElementwiseRule) -> None:
    program = rule.program
    back = parse_program(python_source(program))
    tree = [{name: normal(shape, k) for k, name in enumerate(program.tensors)} for shape in SHAPES.values()]
    scalars = {**rule.hp, "t": 1.0}
    torch.testing.assert_close(
        evaluate_tree(back, tree, scalars), evaluate_tree(program, tree, scalars), rtol=0, atol=0
    )


@pytest.mark.parametrize("execution", ["auto", "fused", "foreach", "loop", "plain"])
def test_every_execution_of_an_optimizer_is_the_program(execution: Any) -> None:
    rule = MuonLike()
    params = {name: torch.nn.Parameter(normal(shape)) for name, shape in SHAPES.items()}
    optimizer = metaopt.optimizer(rule, [*params.values()], execution=execution)
    expected = {name: (param.detach().clone(), torch.zeros_like(param)) for name, param in params.items()}
    for step in range(3):
        for name, param in params.items():
            param.grad = normal(tuple(param.shape), 20 + step)
            tensors = {"param": expected[name][0], "grad": param.grad, "buffer": expected[name][1]}
            new, buffer = evaluate(rule.program, tensors, {**rule.hp, "t": step + 1.0})
            expected[name] = new, buffer
        optimizer.step()
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), expected[name][0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_population_machines_agree_beside_programs_without_matrices(dtype: torch.dtype) -> None:
    plain = Program(("lr",), ("param", "grad", "m"), (Statement("new", "sub", ("param", "grad")),), ("new", "m"))
    programs = [plain, MuonLike().program, Factored().program]
    runs = torch.tensor([1, 0, 2, 1, 0])
    sizes = [normal(shape).numel() for shape in SHAPES.values()]
    params, grads = (normal((5, sum(sizes)), seed).to(dtype) for seed in (0, 1))
    slots = normal((1, 5, sum(sizes)), 2).to(dtype)
    population = encode(programs)
    scalars = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "t": 1.0}
    before = [tensor.clone() for tensor in (params, slots)]
    (numbers,) = population.numbers(runs, scalars, dtype)
    PopulationStep(population, runs, [*SHAPES.values()])(params, grads, slots, numbers)
    # of five steps in float32, each by other products: docstring of newton_schulz
    rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (1e-4, 1e-5)
    for k, program in enumerate(programs[i] for i in runs):
        parts = [tensor.split(sizes) for tensor in (before[0][k], grads[k], before[1][0, k])]
        tree = [
            {name: part.reshape(shape) for name, part in zip(program.tensors, leaf, strict=False)}
            for shape, leaf in zip(SHAPES.values(), zip(*parts, strict=True), strict=True)
        ]
        columns = zip(*evaluate_tree(program, tree, scalars), strict=True)
        new_param, *new_slots = (torch.cat([leaf.flatten() for leaf in column]) for column in columns)
        torch.testing.assert_close(params[k], new_param, rtol=rtol, atol=atol)
        expected_slot = new_slots[0] if new_slots else before[1][0, k]
        torch.testing.assert_close(slots[0, k], expected_slot, rtol=rtol, atol=atol)


def test_a_population_without_shapes_has_vectors() -> None:
    population, runs = encode([of_op("orthogonalise")]), torch.zeros(2, dtype=torch.int64)
    grads = normal((2, 6))
    params = torch.zeros_like(grads)
    PopulationStep(population, runs)(params, grads, grads.new_zeros(0, 2, 6), grads.new_zeros(2, 0))
    torch.testing.assert_close(params, torch.stack([orthogonalise(row) for row in grads]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_an_exported_file_needs_torch_alone_and_steps_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_module(RULES[name], "Exported", tmp_path / f"{name}.py")
    assert "import metaopt" not in path.read_text() and "from metaopt" not in path.read_text()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    ours, theirs = ([torch.nn.Parameter(normal(shape)) for shape in SHAPES.values()] for _ in range(2))
    optimizers = metaopt.optimizer(RULES[name], ours), module.Exported(theirs)
    for step in range(4):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param in params:
                param.grad = normal(tuple(param.shape), step)
            optimizer.step()
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-13)
