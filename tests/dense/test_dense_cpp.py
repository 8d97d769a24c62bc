"""Dense networks in C++ give the losses, gradients and training runs that torch gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaopt import registry, tree
from metaopt.dense.cpp import dense_gradients, dense_unroll
from metaopt.dense.network import ACTIVATIONS, LOSSES, DenseNetwork
from metaopt.inner_step import gradients
from metaopt.program.build import compiler
from metaopt.program.program import Program, Statement
from metaopt.random import sample_indices
from metaopt.rule import ElementwiseRule, Params
from metaopt.task import Split, Task
from metaopt.unroll import Carry, start, unroll
from metaopt_tasks.autoencoder import Autoencoder, MLPCoder
from metaopt_tasks.mlp import MLPClassifier, hinge

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Of a tensor's largest entry: chains of sums of up to 100 products, in another order than torch's."""

SIZES = {
    "whole_vectors": ((64, 32, 10), 64),
    "no_whole_vector": ((3, 17, 5, 7), 13),
    "linear_one_example": ((5, 3), 1),
    "wider_than_a_tile": ((20, 70, 33, 40), 33),
}

TORCH_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "elu": F.elu, "softplus": F.softplus, "tanh": torch.tanh,
    "sin": torch.sin, "linear": torch.nn.Identity(),
}  # fmt: skip


def network(layers: int, activation: str = "relu", loss: str = "cross_entropy", smoothing: float = 0.0) -> DenseNetwork:
    return DenseNetwork(tuple((f"w{i}", f"b{i}") for i in range(layers)), activation, loss, smoothing)


def drawn(
    dense: DenseNetwork, sizes: tuple[int, ...], batch: int, dtype: torch.dtype = torch.float32, copies: int = 3
) -> tuple[Params, Tensor, Tensor]:
    """Parameters of copies, and a batch for each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(copies, *shape, generator=generator, dtype=dtype)

    params: Params = {}
    for (weight, bias), (into, out) in zip(dense.layers, pairwise(sizes), strict=True):
        params |= {weight: normal(out, into) / into**0.5, bias: normal(out)}
    labels = torch.randint(sizes[-1], (copies, batch), generator=generator)
    return params, normal(batch, sizes[0]), normal(batch, sizes[-1]) if dense.loss == "mse" else labels


def torch_loss(dense: DenseNetwork, params: Params, inputs: Tensor, target: Tensor) -> Tensor:
    """Of one copy."""
    h = inputs
    for i, (weight, bias) in enumerate(dense.layers):
        h = TORCH_ACTIVATIONS[dense.activations[i - 1]](h) if i else h
        h = F.linear(h, params[weight], params[bias])
    if dense.loss == "cross_entropy":
        return F.cross_entropy(h, target, label_smoothing=dense.label_smoothing)
    if dense.loss == "squared_error":
        return (h - F.one_hot(target, h.shape[1]) + 1 / h.shape[1]).square().sum(1).mean()
    # the task's own, as F.multi_margin_loss, which it equals otherwise, takes NaN for 0
    return hinge(h, target) if dense.loss == "hinge" else F.mse_loss(h, target)


def torch_gradients(dense: DenseNetwork, params: Params, inputs: Tensor, target: Tensor) -> tuple[Tensor, Params]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = [
        torch_loss(dense, {name: p[k] for name, p in leaves.items()}, inputs[k], target[k]) for k in range(len(inputs))
    ]
    grads = torch.autograd.grad(torch.stack(losses).sum(), [*leaves.values()])
    return torch.stack(losses).detach(), dict(zip(leaves, grads, strict=True))


def assert_rounded(found: tuple[Tensor, Params], wanted: tuple[Tensor, Params]) -> None:
    for a, b in [(found[0], wanted[0]), *((found[1][name], wanted[1][name]) for name in wanted[1])]:
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING[b.dtype] * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SIZES)
def test_losses_and_gradients_are_those_of_autograd(shape: str, activation: str, loss: str, dtype: torch.dtype) -> None:
    sizes, batch = SIZES[shape]
    dense = network(len(sizes) - 1, activation, loss)
    batch_of_copies = drawn(dense, sizes, batch, dtype)
    found = dense_gradients(dense, *batch_of_copies)
    assert found is not None
    assert_rounded(found, torch_gradients(dense, *batch_of_copies))


def test_each_layer_may_have_an_activation_of_its_own() -> None:
    layers = tuple((f"w{i}", f"b{i}") for i in range(4))
    dense = DenseNetwork(layers, ("relu", "linear", "softplus"), "mse")  # relu has a backward pass of its own
    batch_of_copies = drawn(dense, (9, 8, 3, 8, 9), 20, torch.float64)
    found = dense_gradients(dense, *batch_of_copies)
    assert found is not None
    assert_rounded(found, torch_gradients(dense, *batch_of_copies))


def test_labels_are_smoothed_as_in_torch() -> None:
    dense = network(2, smoothing=0.3)
    batch_of_copies = drawn(dense, (9, 8, 4), 20, torch.float64)
    found = dense_gradients(dense, *batch_of_copies)
    assert found is not None
    assert_rounded(found, torch_gradients(dense, *batch_of_copies))


DENSE_FAMILIES = ("mlp_classifier", "mlp_regressor", "mup_mlp", "autoencoder")
DENSE_TASKS = [
    name
    for name, spec in registry.specs("task").items()
    if spec.facts.get("family") in DENSE_FAMILIES and spec.facts["suite"] != "large"
]


@pytest.mark.parametrize("name", DENSE_TASKS)
def test_what_a_task_says_of_its_training_loss_is_true(name: str) -> None:
    task = registry.create("task", name)
    if task.dense is None:
        if isinstance(task, Autoencoder):
            assert task.criterion == "bce" or not isinstance(task.coder, MLPCoder)
        else:
            assert task.stochastic or task.norm != "none" or task.criterion in ("l1", "huber")
        return
    carry = start(task, registry.create("optimizer", "sgd"), [0, 1])
    batch = task.train.take(sample_indices(carry.seeds, carry.step, task.batch_size, len(task.train)))
    found = dense_gradients(task.dense, carry.params, *task.dense.examples(batch, 2))
    assert found is not None
    assert_rounded(found, gradients(torch.vmap(task.training_loss), carry.params, {}, batch)[:2])


def test_a_subclass_and_a_wrapper_with_a_loss_of_their_own_are_no_dense_networks() -> None:
    class Shifted(MLPClassifier):
        def training_loss(self, params: Params, buffers: Params, batch: Params) -> tuple[Tensor, Params]:
            return super().training_loss(params, buffers, batch)[0] + 1, buffers

    task = registry.create("task", "digits_mlp")
    assert task.dense is not None
    assert Shifted("shifted", task.train, task.valid, task.test, classes=10).dense is None
    for name in ("digits_mlp_reparam_global", "digits_mlp_flip30", "digits_mlp_dropout"):
        assert registry.create("task", name).dense is None


# -- what is not finite, and what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_spreads_as_in_torch_and_stays_in_its_copy(activation: str, loss: str) -> None:
    dense = network(3, activation, loss)
    params, inputs, target = drawn(dense, (6, 5, 5, 4), 7)
    clean = dense_gradients(dense, params, inputs, target)
    params["w1"][1, 2, 3] = torch.nan
    found, wanted = dense_gradients(dense, params, inputs, target), torch_gradients(dense, params, inputs, target)
    assert clean is not None and found is not None
    assert found[0].isnan().tolist() == [False, True, False]
    for name, grad in found[1].items():
        assert torch.equal(grad.isnan(), wanted[1][name].isnan()), name
        assert torch.equal(grad[[0, 2]], clean[1][name][[0, 2]])


def test_a_label_that_is_no_class_and_an_index_that_is_no_example_are_refused() -> None:
    dense = network(1)
    params, inputs, target = drawn(dense, (5, 3), 4)
    for label in (3, -100):  # torch leaves examples out that are labelled -100
        target[1, 2] = label
        with pytest.raises(IndexError, match=r"labels must be in \[0, 3\)"):
            dense_gradients(dense, params, inputs, target)
    target.clamp_(min=0)
    for index in (4, -1):
        with pytest.raises(IndexError, match=r"indices must be in \[0, 4\)"):
            run_momentum(dense, params, inputs[0], target[0], index=index)


def test_tensors_that_are_not_the_networks_are_left_to_torch() -> None:
    dense = network(1)
    params, inputs, target = drawn(dense, (5, 3), 4)
    assert dense_gradients(dense, params, inputs, target) is not None
    for what, changed in {
        "another parameter": ({**params, "scale": params["b0"]}, inputs, target),
        "half precision": ({name: p.half() for name, p in params.items()}, inputs.half(), target),
        "two dtypes": (params, inputs.double(), target),
        "another width": (params, inputs[..., :4], target),
        "other copies": (params, inputs[:2], target[:2]),
        "another batch": (params, inputs, target[:, :2]),
        "targets that are no classes": (params, inputs, target.float()),
        "another device": tuple(tree.map_tree(lambda t: t.to("meta"), part) for part in (params, inputs, target)),
    }.items():
        assert dense_gradients(dense, *changed) is None, what


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "swish"}, "activation must be one of"),
        ({"activation": ("relu",)}, "activation must be one name, or 0 for 1 layers, got 1"),
        ({"loss": "l1"}, "loss must be one of"),
        ({"layers": ()}, "layers must name at least one"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"loss": "mse", "label_smoothing": 0.1}, "0 unless loss is cross_entropy"),
    ],
)
def test_networks_that_there_are_not_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseNetwork(**{"layers": (("w", "b"),), "activation": "relu", "loss": "cross_entropy"} | wrong)


# -- training runs -----------------------------------------------------------------------------------------------------


def digits(dtype: torch.dtype) -> Task:
    """The digits MLP whose examples have this dtype."""
    task: Task = registry.create("task", "digits_mlp")
    tensors = task.train.tensors
    task.train = Split({"input": tensors["input"].to(dtype), "label": tensors["label"]})
    return task


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (arXiv:2302.06675, algorithm 2), without weight decay."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.mul_(0.99).add_(p.grad, alpha=0.01)


RULES: dict[str, tuple[float, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": (1e-3, torch.optim.AdamW),
    "lion": (1e-4, Lion),
    "momentum": (1e-2, partial(torch.optim.SGD, momentum=0.9)),
}
STEPS = 200


def begun(task: Task, rule: ElementwiseRule, copies: int, dtype: torch.dtype) -> Carry:
    carry = start(task, rule, list(range(copies)))
    carry.params = {name: p.to(dtype) for name, p in carry.params.items()}
    carry.state = tree.map_tree(lambda s: s.to(dtype) if s.is_floating_point() else s, carry.state)
    return carry


def trained_by_torch(
    task: Task, optimizer: Callable[..., torch.optim.Optimizer], carry: Carry, rates: list[float]
) -> tuple[Tensor, list[Params], list[dict[str, Any]]]:
    """Losses, parameters and optimizer states of plain loops, one per copy."""
    losses, params, states = [], [], []
    for k, rate in enumerate(rates):
        leaves = {name: p[k].clone().requires_grad_() for name, p in carry.params.items()}
        by = optimizer([*leaves.values()], lr=rate)
        for at in sample_indices(carry.seeds[k].expand(STEPS), torch.arange(STEPS), task.batch_size, len(task.train)):
            with torch.enable_grad():
                loss = task.training_loss(leaves, {}, task.train.take(at))[0]
                loss.backward()
            by.step()
            by.zero_grad()
            losses.append(loss.detach())
        params.append(tree.detach(leaves))
        states.append({name: by.state[leaf] for name, leaf in leaves.items()})
    return torch.stack(losses).unflatten(0, (len(rates), STEPS)), params, states


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_200_steps_are_those_of_torch_optim(name: str) -> None:
    rate, optimizer = RULES[name]
    rule, task = registry.create("optimizer", name), digits(torch.float64)
    carry, rates = begun(task, rule, 2, torch.float64), [rate, 3 * rate]
    losses, after = unroll(
        task, rule, carry, STEPS, hp={"lr": torch.tensor(rates, dtype=torch.float64)}, backend="fused"
    )
    wanted, params, states = trained_by_torch(task, optimizer, carry, rates)
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=0)
    for k in range(2):
        for key, p in params[k].items():
            torch.testing.assert_close(after.params[key][k], p, rtol=0, atol=1e-9)
            for slot in rule.slots:
                torch.testing.assert_close(after.state[key][slot][k], states[k][key][slot], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_200_steps_in_float32_differ_by_rounding(name: str) -> None:
    rate, optimizer = RULES[name]
    rule, task = registry.create("optimizer", name), digits(torch.float32)
    carry = begun(task, rule, 1, torch.float32)
    losses, after = unroll(task, rule, carry, STEPS, hp={"lr": rate}, backend="fused")
    wanted, params, _ = trained_by_torch(task, optimizer, carry, [rate])
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-6)
    for key, p in params[0].items():
        # where a gradient is nearly 0, rounding decides about its sign: a few whole steps of Lion, shares of AdamW's
        torch.testing.assert_close(after.params[key][0], p, rtol=0, atol=10 * rate if name == "lion" else 1e-5)
        assert float((after.params[key][0] - p).abs().mean()) < 1e-6


@torch.no_grad()
def test_a_copy_that_diverges_is_reported_and_touches_no_other() -> None:
    rule, task = registry.create("optimizer", "momentum"), digits(torch.float32)
    carry = begun(task, rule, 3, torch.float32)
    rates = torch.tensor([1e-2, 1e30, 1e-3])
    losses, after = unroll(task, rule, carry, 20, hp={"lr": rates}, backend="fused")
    assert after.alive.tolist() == [True, False, True]
    assert losses.isfinite().all(1).tolist() == [True, False, True]
    for k in (0, 2):
        alone, single = unroll(
            task, rule, Carry.from_tree(tree.map_tree(lambda leaf, k=k: leaf[k : k + 1], carry.tree())), 20,
            hp={"lr": rates[k : k + 1]}, backend="fused",
        )  # fmt: skip
        assert torch.equal(losses[k], alone[0])
        assert all(torch.equal(after.params[name][k], p[0]) for name, p in single.params.items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_parameter_that_is_not_finite_is_reported_though_the_loss_is(value: float) -> None:
    """-inf in front of a relu is a dead unit, and no loss will ever tell."""
    dense = network(2)
    params, inputs, target = drawn(dense, (5, 4, 3), 6)
    params["b0"][1, 2] = -value
    losses, _, _, finite = run_momentum(dense, params, inputs[0], target[0], steps=2)
    assert finite.tolist() == [True, False, True]
    assert losses[[0, 2]].isfinite().all()
    assert bool(losses[1].isfinite().all()) == (value == torch.inf)


def test_what_is_given_is_not_changed_and_threads_change_no_bit() -> None:
    dense = network(2, "gelu", "mse")
    params, inputs, target = drawn(dense, (5, 4, 3), 6, copies=5)
    before = {name: p.clone() for name, p in params.items()}
    alone = run_momentum(dense, params, inputs[0], target[0])
    torch.set_num_threads(2)
    try:
        together = run_momentum(dense, params, inputs[0], target[0])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(params[name], p) for name, p in before.items())
    pairs = zip(*(tree.leaves(dict(enumerate(run))) for run in (alone, together)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


MOMENTUM = Program(
    scalars=("lr",),
    tensors=("param", "grad", "momentum"),
    statements=(
        Statement("kept", "mul", (0.9, "momentum")),
        Statement("new_momentum", "add", ("kept", "grad")),
        Statement("step", "mul", ("lr", "new_momentum")),
        Statement("new_param", "sub", ("param", "step")),
    ),
    outputs=("new_param", "new_momentum"),
)


def run_momentum(
    dense: DenseNetwork, params: Params, inputs: Tensor, target: Tensor, steps: int = 3, index: int | None = None
) -> tuple[Tensor, Params, Any, Tensor]:
    """Steps on two examples each, all of which are ``index`` if it is given."""
    copies = len(params["b0"])
    rates = {"lr": torch.full((copies, steps), 0.1, dtype=torch.float64)}
    state = {name: {"momentum": torch.zeros_like(p)} for name, p in params.items()}
    indices = torch.arange(copies * steps * 2).reshape(copies, steps, 2) % len(inputs)
    if index is not None:
        indices.fill_(index)
    done = dense_unroll(dense, MOMENTUM, rates, params, state, inputs, target, indices)
    assert done is not None
    return done


def test_the_operations_of_a_dense_task_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    task = registry.create("task", "digits_mlp_2layer")
    known = task.forward_flops()
    monkeypatch.setattr(type(task), "dense", None)
    assert known == task.forward_flops() > 0
