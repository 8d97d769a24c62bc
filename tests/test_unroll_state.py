"""What an unroll carries besides parameters, and what it draws: buffers, random numbers, and every back-end alike."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor

from metaopt import registry, tree
from metaopt.meta.inner import write_copies
from metaopt.random import normal, step_keys, uniform
from metaopt.rule import ElementwiseRule, Params, UpdateRule
from metaopt.space import hyper
from metaopt.task import Batch, Split, Task
from metaopt.unroll import Carry, start, unroll
from metaopt_classic.adam import AdamW
from metaopt_learned.adafac_mlp import AdafacMLP

BACKENDS = ["eager", "loop"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@dataclass(eq=False)
class Averaging(Task):
    """Least squares with noisy targets; its buffers count the steps and sum the losses and weights that it saw."""

    stochastic: ClassVar[bool] = True

    def init(self, generator: Generator) -> Params:
        return {"weight": torch.randn(3, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (batch["input"] @ params["weight"] - batch["target"]).square().mean()

    def buffers(self) -> Params:
        return {"steps": torch.zeros((), dtype=torch.int64), "losses": torch.zeros(()), "weights": torch.zeros(3)}

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        noise = normal(batch["random"], batch["target"].shape, dtype=params["weight"].dtype)
        loss = self.loss(params, batch | {"target": batch["target"] + noise})
        return loss, {
            "steps": buffers["steps"] + 1,
            "losses": buffers["losses"] + loss,
            "weights": buffers["weights"] + params["weight"],
        }


@pytest.fixture
def task() -> Task:
    generator = Generator().manual_seed(0)
    data = Split({"input": torch.randn(30, 3, generator=generator), "target": torch.randn(30, generator=generator)})
    return Averaging("averaging", data, data, data, batch_size=4, horizon=20)


def sgd(lr: float = 0.05) -> UpdateRule:
    return registry.create("optimizer", "sgd", lr=lr)


def learned(copies: int) -> UpdateRule:
    rule = AdafacMLP(hidden=4, step_scale=0.01)
    thetas = [rule.init_theta(Generator().manual_seed(i)) for i in range(copies)]
    return rule.bind(tree.stack(thetas), stacked=True)


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_buffers_see_every_step_of_their_own_copy(task: Task, backend: str) -> None:
    carry = start(task, sgd(), torch.arange(3))
    total, weights = torch.zeros(3), torch.zeros(3, 3)
    for _ in range(4):
        weights = weights + carry.params["weight"]
        losses, carry = unroll(task, sgd(), carry, 1, backend=backend)
        total = total + losses[:, 0]
    assert carry.buffers["steps"].tolist() == [4, 4, 4]
    torch.testing.assert_close(carry.buffers["losses"], total, **CLOSE)
    torch.testing.assert_close(carry.buffers["weights"], weights, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_buffers_of_a_diverged_copy_are_frozen_with_it(task: Task, backend: str) -> None:
    rates = torch.tensor([0.05, 1e25, 0.05])
    begin = start(task, sgd(), torch.arange(3))
    losses, carry = unroll(task, sgd(), begin, 6, hp={"lr": rates}, backend=backend)
    assert carry.alive.tolist() == [True, False, True]
    made = int(carry.step[1])
    assert made < 6 and carry.buffers["steps"].tolist() == [6, made, 6]
    assert all(bool(torch.isfinite(b).all()) for b in carry.buffers.values())
    _, later = unroll(task, sgd(), carry, 3, hp={"lr": rates}, backend=backend)
    assert equal(tree.index(later.buffers, 1), tree.index(carry.buffers, 1))
    alone, _ = unroll(task, sgd(), start(task, sgd(), [2]), 6, backend=backend)
    torch.testing.assert_close(losses[2], alone[0], **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_windows_and_checkpoints_change_no_bit(task: Task, backend: str, tmp_path: Any) -> None:
    begin = start(task, AdamW(), torch.arange(4))
    whole, end = unroll(task, AdamW(), begin, 7, backend=backend)
    parts, carry = [], begin
    for steps in (1, 4, 2):
        torch.save(carry.tree(), tmp_path / "carry.pt")
        restored = Carry.from_tree(torch.load(tmp_path / "carry.pt", weights_only=True))
        losses, carry = unroll(task, AdamW(), restored, steps, backend=backend)
        parts.append(losses)
    assert torch.equal(whole, torch.cat(parts, 1))
    assert equal(end.tree(), carry.tree())


@dataclass(eq=False)
class Doomed(Task):
    """A bowl in float64; in copies whose ``doomed`` is 1 the loss becomes infinite at the fourth step."""

    def init(self, generator: Generator) -> Params:
        return {"weight": torch.randn(3, generator=generator).double()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return params["weight"].square().sum()

    def buffers(self) -> Params:
        return {"before": torch.full((3,), torch.nan, dtype=torch.float64), "count": torch.zeros(())}

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        over = (buffers["count"] >= 3) & (batch["doomed"] > 0)
        loss = self.loss(params, batch) * torch.where(over, torch.inf, 1.0)
        return loss, {"before": params["weight"], "count": buffers["count"] + 1}


def doomed_runs(doomed: list[float]) -> tuple[Task, Carry]:
    task = Doomed("doomed", Split(), Split(), Split(), config={"doomed": torch.zeros(())})
    return task, start(task, AdamW(), torch.arange(len(doomed)), config={"doomed": torch.tensor(doomed)})


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01, 0.02, 0.03])])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_copy_that_diverges_changes_no_bit_of_others_nor_of_other_windows(backend: str, lr: Any) -> None:
    task, begin = doomed_runs([0.0, 1.0, 0.0])
    whole, end = unroll(task, AdamW(), begin, 300, hp={"lr": lr}, backend=backend)
    assert end.alive.tolist() == [True, False, True] and end.step.tolist() == [300, 3, 300]
    carry, parts = begin, []
    for steps in (2, 3, 295):
        losses, carry = unroll(task, AdamW(), carry, steps, hp={"lr": lr}, backend=backend)
        parts.append(losses)
    assert torch.equal(torch.cat(parts, 1).nan_to_num(), whole.nan_to_num())
    assert equal(carry.tree(), end.tree())
    others, healthy = unroll(task, AdamW(), doomed_runs([0.0] * 3)[1], 300, hp={"lr": lr}, backend=backend)
    assert torch.equal(whole[[0, 2]], others[[0, 2]])
    assert torch.equal(end.params["weight"][[0, 2]], healthy.params["weight"][[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_buffer_that_is_a_parameter_keeps_the_value_of_its_step(backend: str) -> None:
    task, begin = doomed_runs([0.0, 0.0])
    _, middle = unroll(task, AdamW(), begin, 2, backend=backend)
    _, end = unroll(task, AdamW(), middle, 1, backend=backend)
    assert torch.equal(end.buffers["before"], middle.params["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_slot_of_another_shape_is_not_read_beyond_its_end(backend: str) -> None:
    class Broadcast(ElementwiseRule):
        lr: float = hyper(0.1, 0.0, 1.0)
        slots = ("mean",)

        def init_slot(self, slot: str, param: Tensor) -> Tensor:
            return param.new_ones(())

        def elementwise(self, param: Any, grad: Any, mean: Any, lr: Any) -> Any:
            new = 0.5 * mean + grad
            return param - lr * new, new

    task, _ = doomed_runs([0.0, 0.0])
    begin = start(task, Broadcast(), [0, 1], config={"doomed": torch.zeros(2)})
    _, end = unroll(task, Broadcast(), begin, 1, backend=backend)
    weight = begin.params["weight"]
    torch.testing.assert_close(end.params["weight"], weight - 0.1 * (0.5 + 2 * weight))


def test_inference_mode_is_refused_in_one_sentence(task: Task) -> None:
    begin = start(task, sgd(), [1])
    with torch.inference_mode():
        for call in (lambda: start(task, sgd(), [1]), lambda: unroll(task, sgd(), begin, 1)):
            with pytest.raises(RuntimeError, match=r"forbids; use torch\.no_grad"):
                call()


@torch.no_grad()
def test_a_carry_without_buffers_makes_the_round_trip_too() -> None:
    task = registry.create("task", "quadratic_20")
    carry = start(task, sgd(), [1, 2])
    assert carry.buffers == {}
    saved = carry.tree()
    assert saved["buffers"] == {} and equal(Carry.from_tree(saved).tree(), saved)


@torch.no_grad()
def test_an_unroll_leaves_the_carry_that_it_was_given(task: Task) -> None:
    for backend in BACKENDS:
        begin = start(task, AdamW(), torch.arange(3))
        before = tree.map_tree(torch.clone, begin.tree())
        unroll(task, AdamW(), begin, 3, backend=backend)
        assert equal(begin.tree(), before)


@torch.no_grad()
def test_fresh_copies_are_written_into_a_state_with_and_without_buffers(task: Task) -> None:
    for made in (task, registry.create("task", "quadratic_20")):
        _, running = unroll(made, sgd(0.001), start(made, sgd(), torch.arange(4)), 3)
        fresh, at = start(made, sgd(), torch.tensor([7, 8])), torch.tensor([2, 0])
        mixed = write_copies(running.tree(), at, fresh.tree())
        assert equal(tree.index(mixed, at), fresh.tree())
        assert equal(tree.index(mixed, torch.tensor([1, 3])), tree.index(running.tree(), torch.tensor([1, 3])))
        losses, _ = unroll(made, sgd(0.001), Carry.from_tree(mixed), 2)
        expected, _ = unroll(made, sgd(0.001), fresh, 2)
        torch.testing.assert_close(losses[at], expected, **CLOSE)


@torch.no_grad()
def test_losses_draw_from_the_key_of_their_seed_and_step(task: Task) -> None:
    seeds, frozen = torch.tensor([3, 3, 9]), sgd(0.0)
    losses, carry = unroll(task, frozen, start(task, frozen, seeds), 5)
    assert torch.equal(losses[0], losses[1]), "antithetic pairs"
    assert not torch.equal(losses[0], losses[2])
    alone, _ = unroll(task, frozen, start(task, frozen, [9]), 5)
    torch.testing.assert_close(alone[0], losses[2], **CLOSE)
    keys = step_keys(carry.seeds[:, None], torch.arange(5))
    assert len(keys.unique()) == 10, "two seeds, five steps"


def test_draws_are_uniform_normal_and_independent_between_streams_and_steps() -> None:
    key = step_keys(torch.tensor(5), torch.tensor(0))
    size = 40_000
    draws = [
        uniform(key, (size,)),
        uniform(key, (size,), 1),
        uniform(step_keys(torch.tensor(5), torch.tensor(1)), (size,)),
    ]
    for draw in draws:
        assert float(draw.min()) > 0 and float(draw.max()) < 1
        expected = torch.full((20,), size / 20)
        chi_square = float(((torch.histc(draw, 20, 0, 1) - expected) ** 2 / expected).sum())
        assert chi_square < 50, "the 0.9999 quantile with 19 degrees of freedom"
    correlation = torch.corrcoef(torch.stack([*draws, normal(key, (size,))])) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / size**0.5
    sample = normal(key, (size,), 3, torch.float64)
    assert abs(float(sample.mean())) < 5 / size**0.5 and abs(float(sample.var()) - 1) < 5 * (2 / size) ** 0.5
    assert abs(float((sample**4).mean()) - 3) < 5 * (96 / size) ** 0.5, "tails of a normal distribution"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_in_half_precision_are_the_float32_ones_rounded(draw: Any, dtype: torch.dtype) -> None:
    key = torch.tensor(5)
    assert torch.equal(draw(key, (1000,), dtype=dtype), draw(key, (1000,)).to(dtype))


CASES = ["adamw", "per_copy_hp", "learned"]


def case(name: str) -> tuple[UpdateRule, dict[str, Any]]:
    if name == "learned":
        return learned(5), {}
    return AdamW(lr=0.01), {"lr": torch.logspace(-3, -1, 5)} if name == "per_copy_hp" else {}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_looping_equals_vmapping_with_and_without_recording(task: Task, name: str, recorded: bool) -> None:
    rule, hp = case(name)
    with torch.set_grad_enabled(recorded):
        begin = start(task, rule, torch.arange(5))
        (eager, end), (loop, other) = (unroll(task, rule, begin, 4, hp=hp, backend=b) for b in BACKENDS)
        plain, _ = unroll(task, rule, begin, 4, hp=hp, backend="auto")
    for found in (loop, plain):
        torch.testing.assert_close(found, eager, **CLOSE)
    for part in ("params", "state", "buffers", "step", "alive"):
        torch.testing.assert_close(getattr(other, part), getattr(end, part), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_a_compiled_unroll_carries_buffers_and_draws_the_same_numbers(task: Task) -> None:
    rule, hp = sgd(), {"lr": torch.tensor([0.01, 0.1])}
    begin = start(task, rule, torch.arange(2))
    (eager, end), (compiled, other) = (unroll(task, rule, begin, 4, hp=hp, backend=b) for b in ("eager", "compile"))
    torch.testing.assert_close(compiled, eager, **CLOSE)
    torch.testing.assert_close(other.buffers, end.buffers, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_a_compiled_unroll_sees_what_changed_since_the_last_one() -> None:
    class Scaled(Doomed):
        scale = 1.0

        def loss(self, params: Params, batch: Batch) -> Tensor:
            return self.scale * params["weight"].square().sum()

    task = Scaled("scaled", Split(), Split(), Split(), config={"doomed": torch.zeros(())})
    begin = start(task, sgd(), [0, 1])
    first, threads = unroll(task, sgd(0.0), begin, 3, backend="compile")[0], torch.get_num_threads()
    task.scale = 2.0
    try:
        torch.set_num_threads(threads + 1)
        second, _ = unroll(task, sgd(0.0), begin, 3, backend="compile")
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("name", ["lr", "theta"])
def test_hypergradients_through_a_loop_equal_those_through_vmap(task: Task, name: str) -> None:
    found = []
    for backend in BACKENDS:
        if name == "lr":
            rule: UpdateRule = AdamW()
            at = {"lr": torch.logspace(-3, -1, 5).requires_grad_()}
            hp: dict[str, Any] = dict(at)
        else:
            core = AdafacMLP(hidden=4, step_scale=0.01)
            at = tree.map_tree(lambda t: t.requires_grad_(), core.init_theta(Generator().manual_seed(0)))
            rule, hp = core.bind(at), {}
        _, end = unroll(task, rule, start(task, rule, torch.arange(5)), 5, hp=hp, backend=backend)
        meta_loss = task.loss({"weight": end.params["weight"].T}, {"input": torch.eye(3), "target": torch.zeros(3, 5)})
        found.append(torch.autograd.grad(meta_loss + end.buffers["losses"].sum(), list(tree.leaves(at))))
    assert all(bool(g.abs().sum() > 0) for g in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hypergradient_through_buffers_equals_finite_differences(task: Task, backend: str) -> None:
    rule = sgd()
    double = {
        split: Split({n: t.double() for n, t in task.train.tensors.items()}) for split in ("train", "valid", "test")
    }
    exact = Averaging("exact", **double, batch_size=4)

    def summed(lr: Tensor) -> Tensor:
        begin = start(exact, rule, [1, 2])
        for part in (begin.params, begin.buffers):
            part.update({name: t.double() if t.is_floating_point() else t for name, t in part.items()})
        _, end = unroll(exact, rule, begin, 5, hp={"lr": lr}, backend=backend)
        return end.buffers["losses"].sum() + end.buffers["weights"].square().sum()

    assert torch.autograd.gradcheck(summed, [torch.tensor(0.03, dtype=torch.float64, requires_grad=True)])
