"""The fused unroll trains as the eager back-end and as ``torch.optim`` do.

Both differ from it by the order in which float32 sums are taken: tolerances are a few roundings of numbers near 1. Over 200
steps: `test_200_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_unroll import unrolled_by_torch

from metaopt import registry, tree
from metaopt.dense.network import DenseNetwork
from metaopt.program import Program, Statement
from metaopt.rule import Params, UpdateRule
from metaopt.unroll import Carry, start, unroll
from metaopt_kernels.dense import Shape
from metaopt_kernels.dense_unroll import dense_unroll, unroll_source
from metaopt_tasks.mlp import MLPClassifier, mlp_classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # NumPy's
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]

NETWORK = DenseNetwork((("fc1.weight", "fc1.bias"), ("fc2.weight", "fc2.bias")), "relu", "cross_entropy")


def digits(device: torch.device, **options: Any) -> MLPClassifier:
    return mlp_classifier(**{"hidden": (4,), "batch_size": 8, "device": device} | options)


def both(task: MLPClassifier, rule: UpdateRule, carry: Carry, steps: int, **options: Any) -> list[tuple[Tensor, Carry]]:
    with torch.no_grad():
        found = unroll(task, rule, carry, steps, backend="fused", **options)
        return [found, unrolled_by_torch(task, rule, carry, steps, **options)]


def assert_close(found: tuple[Tensor, Carry], wanted: tuple[Tensor, Carry], tolerance: float) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1].tree(), wanted[1].tree(), rtol=tolerance, atol=tolerance)


def test_copies_differ_in_hyperparameters_data_and_time(windows: list[int], device: torch.device) -> None:
    task, rule = digits(device, hidden=(5, 3), activation="tanh"), registry.create("optimizer", "adamw")
    carry = start(task, rule, [0, 1])
    hp = {"lr": torch.tensor([0.01, 0.1], device=device), "betas": (0.8, torch.tensor([0.9, 0.99], device=device))}
    with torch.no_grad():
        _, carry = unrolled_by_torch(task, rule, carry, 3, hp=hp)
    carry.step[1] += 5
    found, wanted = both(task, rule, carry, 4, hp=hp)
    assert windows == [4]
    assert_close(found, wanted, 1e-5)


def test_a_copy_that_diverges_ends_as_in_eager_and_touches_no_other(windows: list[int], device: torch.device) -> None:
    task, rule = digits(device, criterion="squared_error"), registry.create("optimizer", "sgd")
    carry = start(task, rule, [0, 1])
    found, wanted = both(task, rule, carry, 6, hp={"lr": torch.tensor([0.1, 1e12], device=device)})
    assert windows == [6]
    assert found[1].alive.tolist() == wanted[1].alive.tolist() == [True, False]
    assert found[1].step.tolist() == wanted[1].step.tolist()
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(tree.index(found[1].params, 0), tree.index(wanted[1].params, 0))


# -- the kernel by itself ----------------------------------------------------------------------------------------------


def drawn(device: torch.device, copies: int = 2, steps: int = 3) -> dict[str, Any]:
    """Arguments of `dense_unroll` besides network, program and coefficients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc1.weight": (4, 7), "fc1.bias": (4,), "fc2.weight": (3, 4), "fc2.bias": (3,)}
    params = {name: torch.randn(copies, *shape, generator=generator).to(device) for name, shape in shapes.items()}
    return {
        "params": params,
        "state": {name: {} for name in shapes},
        "inputs": torch.randn(11, 7, generator=generator).to(device),
        "target": torch.randint(3, (11,), generator=generator).to(device),
        "indices": torch.randint(11, (copies, steps, 5), generator=generator).to(device),
    }


def plain(
    given: Mapping[str, Any], copy: int, optimizer: Callable[..., torch.optim.Optimizer]
) -> tuple[Tensor, Params]:
    """The same run by torch in float64."""
    params = {name: p[copy].double().requires_grad_() for name, p in given["params"].items()}
    steps, losses = optimizer([*params.values()]), []
    for rows in given["indices"][copy]:
        hidden = torch.relu(F.linear(given["inputs"][rows].double(), params["fc1.weight"], params["fc1.bias"]))
        outputs = F.linear(hidden, params["fc2.weight"], params["fc2.bias"])
        loss = F.cross_entropy(outputs, given["target"][rows])
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.detach())
    return torch.stack(losses), tree.detach(params)


def ran(
    program: Program, coefficients: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Tensor, Params, Any, Tensor]:
    """The kernel's run from slots at 0; coefficients are numbers, or tensors that broadcast to [K, T]."""
    shape, device = given["indices"].shape[:2], given["indices"].device
    table = {
        name: torch.as_tensor(value, dtype=torch.float64, device=device).expand(shape)
        for name, value in coefficients.items()
    }
    slots = {name: {slot: torch.zeros_like(p) for slot in program.tensors[2:]} for name, p in given["params"].items()}
    done = dense_unroll(NETWORK, program, table, **dict(given) | {"state": slots})
    assert done is not None
    return done


def test_a_run_is_that_of_torch_optim(device: torch.device) -> None:
    rule, given = registry.create("optimizer", "adamw", lr=0.05, weight_decay=0.1), drawn(device, copies=1, steps=20)
    time = torch.arange(1, 21, dtype=torch.float64, device=device)
    scalars = {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "t": time}
    losses, params, slots, finite = ran(rule.program, rule.program.scalar_values(scalars), given)
    wanted, ends = plain(given, 0, lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1))
    torch.testing.assert_close(losses[0].double(), wanted, rtol=0, atol=5e-6)
    for name, end in ends.items():
        torch.testing.assert_close(params[name][0].double(), end, rtol=0, atol=5e-6)
    assert finite.tolist() == [True]
    assert slots["fc1.weight"].keys() == {"exp_avg", "exp_avg_sq"}


def test_what_was_given_stays_as_it_was(device: torch.device) -> None:
    rule, given = registry.create("optimizer", "adamw"), drawn(device)
    before = tree.map_tree(Tensor.clone, given["params"])
    ran(rule.program, dict.fromkeys(rule.program.coefficients, 0.5), given)
    torch.testing.assert_close(given["params"], before, rtol=0, atol=0)


def test_the_flag_sees_a_loss_that_is_not_finite_and_a_last_step_that_is_not(device: torch.device) -> None:
    program = Program(
        ("lr",), ("param", "grad"),
        (Statement("move", "mul", ("lr", "grad")), Statement("new", "sub", ("param", "move"))), ("new",),
    )  # fmt: skip
    given = drawn(device, copies=4)
    given["params"]["fc2.bias"][1, 0] = torch.nan  # and so is the loss
    lr = torch.full((4, 3), 0.1)
    lr[2, 2] = torch.inf  # the losses are finite, what comes after the last is not
    losses, params, _, finite = ran(program, {"lr": lr}, given)
    assert finite.tolist() == [True, False, False, True]
    assert losses[[0, 2, 3]].isfinite().all()
    few = {**given, "params": {name: p[:1] for name, p in given["params"].items()}, "indices": given["indices"][:1]}
    alone = ran(program, {"lr": lr[:1]}, few)
    assert torch.equal(alone[0][0], losses[0])
    assert all(torch.equal(alone[1][name][0], p[0]) for name, p in params.items())


def test_what_a_rule_makes_of_padding_reaches_nothing(device: torch.device) -> None:
    """Every step adds 1 to each parameter, or makes NaN of those that are exactly 0."""
    statements = (
        Statement("one", "div", ("param", "param")),
        Statement("new", "add", ("param", "one")),
    )
    given = drawn(device, copies=1)
    _, params, _, finite = ran(Program((), ("param", "grad"), statements, ("new",)), {}, given)
    assert finite.all()
    for name, p in given["params"].items():
        torch.testing.assert_close(params[name], p + 3)


def test_outputs_may_be_coefficients_and_inputs(device: torch.device) -> None:
    given = drawn(device, copies=1)
    _, params, slots, _ = ran(Program(("c",), ("param", "grad", "old"), (), ("c", "param")), {"c": 0.25}, given)
    for name, p in params.items():
        torch.testing.assert_close(p, torch.full_like(p, 0.25))
        torch.testing.assert_close(slots[name]["old"], torch.full_like(p, 0.25))


def test_other_slots_than_the_parameters_are_left_to_torch(device: torch.device) -> None:
    given = drawn(device)
    program = Program((), ("param", "grad", "old"), (), ("param", "old"))
    for change in (Tensor.double, lambda p: p[..., :1]):
        given["state"] = {name: {"old": change(p)} for name, p in given["params"].items()}
        assert dense_unroll(NETWORK, program, {}, **given) is None


def test_more_slots_than_registers_are_left_to_torch(device: torch.device) -> None:
    program = registry.create("optimizer", "adamw").program
    network, widths = DenseNetwork((("w", "b"),), "relu", "cross_entropy"), {"w": (128, 128), "b": (128,)}
    params = {name: torch.zeros(1, *shape, device=device) for name, shape in widths.items()}
    state = {name: dict.fromkeys(program.tensors[2:], p) for name, p in params.items()}
    inputs, rows = torch.zeros(5, 128, device=device), torch.zeros(1, 1, 4, dtype=torch.int64, device=device)
    assert dense_unroll(network, program, {}, params, state, inputs, rows.new_zeros(5), rows) is None


def test_every_copy_and_example_is_found_with_64_bits() -> None:
    source = unroll_source(NETWORK, registry.create("optimizer", "lion").program, Shape((64, 32, 10), 64), "tf32x3")
    assert "copy = tl.program_id(0).to(tl.int64)" in source
    assert "at = copy * steps + step" in source
    assert "rows = tl.load(indices + at * 64" in source  # int64, as the indices are
