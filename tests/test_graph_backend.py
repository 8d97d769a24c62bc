"""A recorded window is the window: whatever differs between calls, and whatever the copies do.

On a CPU a recording is a stand-in that runs the window again over its fixed memory, as a graph's replay does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import graph_backend, registry, tree
from metaopt.backends import eager
from metaopt.graph_backend import graph, replayed
from metaopt.inner_step import InnerStep
from metaopt.random import sample_indices
from metaopt.rule import Chain, UpdateRule
from metaopt.task import Task
from metaopt.unroll import Carry, start, unroll
from metaopt_classic.adam import AdamW
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import SAM, ClipByGlobalNorm, Lookahead

K, STEPS = 3, 4
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> None:
    graph_backend._log_eager.cache_clear()


class Recorder:
    """Records by keeping the function."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        made = run()

        def replay() -> None:
            self.replays += 1
            tree.map_tree(Tensor.copy_, made, run())

        return made, replay


class Run:
    """Three copies of a task's runs, stepped by a back-end that gets its arguments as `unroll` makes them."""

    def __init__(self, task: str = "digits_mlp", rule: UpdateRule | None = None, hp: Any = None) -> None:
        found = registry.create("task", task)
        self.task = found if isinstance(found, Task) else found.sample(torch.Generator().manual_seed(0))
        self.rule = rule or AdamW()
        self.hp = {name: as_float64(value) for name, value in {**self.rule.hp, **(hp or {})}.items()}
        self.theta = getattr(self.rule, "theta", {})
        dims = {name: dims_of(value) for name, value in self.hp.items()}
        self.step = InnerStep(self.task, self.rule, getattr(self.rule, "stacked", False), dims, None)
        self.carry = start(self.task, self.rule, list(range(K)))

    def arguments(self, carry: Carry | None = None, steps: int = STEPS) -> tuple[Any, ...]:
        carry = carry or self.carry
        at = (carry.step[:, None] + torch.arange(steps)).reshape(-1)
        seeds = carry.seeds.repeat_interleave(steps)
        indices = sample_indices(seeds, at, self.task.batch_size, len(self.task.train))
        return self.theta, self.hp, carry, indices.reshape(K, steps, -1), torch.full((K,), 50)


def as_float64(value: Any) -> Any:
    """As the back-end hands hyperparameters to a graph, so that nothing is left to round differently."""
    return tuple(map(as_float64, value)) if isinstance(value, tuple) else torch.as_tensor(value, dtype=torch.float64)


def dims_of(value: Any) -> Any:
    return tuple(map(dims_of, value)) if isinstance(value, tuple) else 0 if value.dim() else None


def learned(name: str, copies: int | None = None) -> UpdateRule:
    rule = registry.create("learned_optimizer", name)
    thetas = [rule.init_theta(torch.Generator().manual_seed(i)) for i in range(copies or 1)]
    return rule.bind(tree.stack(thetas), stacked=True) if copies else rule.bind(thetas[0])


RULES: dict[str, Callable[[], UpdateRule]] = {
    **{name: partial(registry.create, "optimizer", name) for name in registry.specs("optimizer")},
    **{name: partial(learned, name) for name in registry.specs("learned_optimizer")},
    "clipped": lambda: Chain(ClipByGlobalNorm(1.0), AdamW()),
    "lookahead": lambda: Lookahead(AdamW(), k=2),
    "sam": lambda: SAM(AdamW()),
}


def assert_same(made: tuple[Tensor, Carry], expected: tuple[Tensor, Carry]) -> None:
    """Bit for bit."""
    for one, other in (
        (made[0], expected[0]),
        *zip(*(tree.leaves(m[1].tree()) for m in (made, expected)), strict=True),
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("task", ["quadratic", "digits_mlp", "diabetes_mlp_norm"])
@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon", "small_fc_lopt", "sam"])
@torch.no_grad()
def test_windows_follow_each_other_as_eager_ones(task: str, rule: str) -> None:
    run, recorder = Run(task, learned(rule, K) if rule == "small_fc_lopt" else RULES[rule]()), Recorder()
    by_graph, by_eager = replayed(run.step, recorder), eager(run.step)
    carry = expected = run.carry
    for _ in range(3):
        losses, carry = by_graph(*run.arguments(carry))
        expected_losses, expected = by_eager(*run.arguments(expected))
        assert_same((losses, carry), (expected_losses, expected))
    assert (recorder.recorded, recorder.replays) == (1, 3)


@torch.no_grad()
def test_what_was_given_and_what_was_returned_stay_as_they_were() -> None:
    run = Run()
    by_graph = replayed(run.step, Recorder())
    before = tree.map_tree(torch.clone, run.carry.tree())
    losses, carry = by_graph(*run.arguments())
    kept = losses.clone(), Carry.from_tree(tree.map_tree(torch.clone, carry.tree()))
    by_graph(*run.arguments(carry))
    assert_same((losses, carry), kept)
    assert_same((losses, run.carry), (losses, Carry.from_tree(before)))


@torch.no_grad()
def test_other_hyperparameters_theta_seeds_and_horizons_need_no_new_recording() -> None:
    recorder = Recorder()
    rates = torch.tensor([1e-3, 1e-2, 3e-2], dtype=torch.float64)
    betas = (torch.full((K,), 0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
    run = Run(hp={"lr": rates, "betas": betas})
    by_graph, by_eager = replayed(run.step, recorder), eager(run.step)
    for factor, seeds in ((1.0, [0, 1, 2]), (3.0, [7, 7, 7])):
        run.hp["lr"] = rates * factor
        run.carry = start(run.task, run.rule, seeds)
        assert_same(by_graph(*run.arguments()), by_eager(*run.arguments()))
    assert recorder.recorded == 1

    run, recorder = Run(rule=learned("celo2_base", K)), Recorder()
    by_graph, by_eager = replayed(run.step, recorder), eager(run.step)
    for factor in (1.0, 2.0):
        run.theta = tree.map_tree(lambda leaf: leaf * factor, run.theta)  # noqa: B023
        theta, hp, carry, indices, horizon = run.arguments()
        assert_same(*(by(theta, hp, carry, indices, horizon * int(factor)) for by in (by_graph, by_eager)))
    assert recorder.recorded == 1


@torch.no_grad()
def test_plain_numbers_are_taken_as_they_come() -> None:
    run, recorder = Run(), Recorder()
    by_graph = replayed(run.step, recorder)
    for lr in (1e-3, 1e-2):
        theta, _, *rest = run.arguments()
        plain = {**AdamW().hp, "lr": lr}
        made, expected = by_graph(theta, plain, *rest), eager(run.step)(theta, plain, *rest)
        # a power of two floats and of two float64 tensors may round differently
        torch.testing.assert_close(made[0], expected[0], rtol=1e-6, atol=0)
    assert recorder.recorded == 1


@torch.no_grad()
def test_a_copy_that_diverges_is_frozen_where_it_was_last_finite() -> None:
    run = Run("digits_mlp", SGD(), {"lr": torch.tensor([0.1, 1e30, 0.1], dtype=torch.float64)})
    by_graph, by_eager = replayed(run.step, Recorder()), eager(run.step)
    carry = expected = run.carry
    for _ in range(2):  # it diverges in the first window, and enters the second frozen
        losses, carry = by_graph(*run.arguments(carry))
        expected_losses, expected = by_eager(*run.arguments(expected))
        assert_same((losses, carry), (expected_losses, expected))
    assert carry.alive.tolist() == [True, False, True]
    assert losses[1].isnan().all()
    assert carry.step[1] < carry.step[0]


@torch.no_grad()
def test_long_windows_are_replayed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_backend, "STEPS_PER_GRAPH", 3)
    run, recorder = Run("quadratic"), Recorder()
    assert_same(replayed(run.step, recorder)(*run.arguments(steps=10)), eager(run.step)(*run.arguments(steps=10)))
    assert (recorder.recorded, recorder.replays) == (2, 4)  # 3 + 3 + 3 steps by one recording, 1 by another


@torch.no_grad()
def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    tried = 0

    def record(_: Any) -> Any:
        nonlocal tried
        tried += 1
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    run = Run("quadratic")
    by_graph = replayed(run.step, record)
    for _ in range(2):
        assert_same(by_graph(*run.arguments()), eager(run.step)(*run.arguments()))
    assert tried == 1
    assert caplog.messages == ["backend 'graph' runs eagerly: called a synchronizing CUDA operation"]


def test_steps_that_are_recorded_run_eagerly_and_stay_differentiable(caplog: pytest.LogCaptureFixture) -> None:
    run, recorder = Run("quadratic"), Recorder()
    run.hp["lr"].requires_grad_()
    by_graph = replayed(run.step, recorder)
    with caplog.at_level(logging.WARNING, "metaopt"):
        losses, _ = by_graph(*run.arguments())
        by_graph(*run.arguments())
    assert torch.autograd.grad(losses.sum(), run.hp["lr"])[0] != 0
    assert recorder.recorded == 0
    assert len(caplog.messages) == 1
    assert "records no gradients" in caplog.text


@torch.no_grad()
def test_errors_of_a_rule_are_not_taken_for_a_failed_recording() -> None:
    run = Run("quadratic")
    del run.hp["lr"]
    with pytest.raises(ValueError, match="in_dims is not compatible"):
        replayed(run.step, Recorder())(*run.arguments())


def test_a_task_on_the_cpu_is_refused_at_the_door() -> None:
    run = Run("quadratic")
    with pytest.raises(ValueError, match="needs a task on a CUDA device, got one on 'cpu'"):
        graph(run.step)


# -- what a graph can record -------------------------------------------------------------------------------------------

READS_ON_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}


class OnlyTheDevice(TorchDispatchMode):
    """Refuses what a capture refuses: reading a tensor on the host, and making one of numbers that lie there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in args[1] or ()
            if isinstance(args[1], list | tuple)
        )
        if name in READS_ON_THE_HOST or name == "lift_fresh" or masks:
            raise RuntimeError(f"not in a capture: {function}")
        return function(*args, **(kwargs or {}))


def record_on_the_device(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    with OnlyTheDevice():
        made = run()
    return made, lambda: None


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_a_graph_can_record_every_rule(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run("digits_mlp", RULES[rule]())
    replayed(run.step, record_on_the_device)(*run.arguments(steps=1))
    assert caplog.messages == []


@ON_GPU
@pytest.mark.parametrize("rule", ["adamw", "muon", "small_fc_lopt"])
@torch.no_grad()
def test_on_a_gpu_a_graph_is_the_eager_unroll(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    found = RULES[rule]()
    task = registry.create("task", "digits_mlp").to("cuda")
    carry = expected = start(task, found, list(range(K)))
    for lr in (1e-3, 1e-2):
        hp = {"lr": lr * torch.arange(1, K + 1)} if "lr" in found.hp else {}
        losses, carry = unroll(task, found, carry, 10, hp=hp, backend="graph")
        expected_losses, expected = unroll(task, found, expected, 10, hp=hp, backend="eager")
        # the same kernels, but a library may choose another algorithm for another workspace
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert torch.equal(carry.alive, expected.alive)
    assert caplog.messages == []
