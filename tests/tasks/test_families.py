"""What every family of tasks promises, checked on its first named member."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.func import grad_and_value, vmap

from metaopt import registry, tree
from metaopt.random import sample_indices, step_keys
from metaopt.rule import ROLES, Params
from metaopt.task import Batch, Task, TaskFamily
from metaopt.unroll import Carry, start, unroll
from metaopt_tasks.game import Game

COPIES = 3
SPECS = {name: spec for name, spec in registry.specs("task").items() if spec.facts.get("family")}
FAMILIES = sorted({spec.facts["family"] for spec in SPECS.values()})


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@cache
def member(family: str) -> Task:
    return registry.create("task", next(name for name, spec in SPECS.items() if spec.facts["family"] == family))


@pytest.fixture(params=FAMILIES)
def task(request: pytest.FixtureRequest) -> Task:
    return member(request.param)


def batches(task: Task, seeds: Tensor, step: int = 0) -> Batch:
    """What the unroll hands to K copies."""
    steps = torch.full_like(seeds, step)
    batch = task.train.take(sample_indices(seeds, steps, task.batch_size, len(task.train)))
    batch |= tree.map_tree(lambda c: c.expand(len(seeds), *c.shape), dict(task.config))
    return batch | ({"random": step_keys(seeds, steps)} if task.stochastic else {})


def copies(task: Task) -> tuple[Params, Params]:
    params = tree.stack([task.init(generator(seed)) for seed in range(COPIES)])
    return params, tree.map_tree(lambda b: b.expand(COPIES, *b.shape).clone(), task.buffers())


def double(values: Any) -> Any:
    return tree.map_tree(lambda t: t.double() if t.is_floating_point() else t, values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_vmapped_losses_and_gradients_equal_a_loop_over_copies(
    task: Task, dtype: torch.dtype, tolerance: float
) -> None:
    cast = double if dtype == torch.float64 else (lambda values: values)
    (params, buffers), batch = (cast(part) for part in copies(task)), cast(batches(task, torch.arange(COPIES)))
    step = grad_and_value(task.training_loss, has_aux=True)
    grads, (losses, new_buffers) = vmap(step)(params, buffers, batch)
    assert losses.dtype == dtype
    for k in range(COPIES):
        alone = (tree.index(part, k) for part in (params, buffers, batch))
        expected, (loss, expected_buffers) = step(*alone)
        torch.testing.assert_close(losses[k], loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(tree.index(new_buffers, k), expected_buffers, rtol=tolerance, atol=tolerance)
        for name, gradient in expected.items():
            size = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(grads[name][k] / size, gradient / size, rtol=0, atol=tolerance)


def test_gradients_equal_finite_differences_in_float64(task: Task) -> None:
    params = double(task.init(generator(0)))
    batch, buffers = double(tree.index(batches(task, torch.tensor([5])), 0)), double(task.buffers())
    losses = {"": (lambda p: task.training_loss(p, buffers, batch)[0], list(params))}
    if isinstance(task, Game):  # each player's loss in that player's parameters
        losses = {
            player: (lambda p, player=player: task.player_losses(p, buffers, batch)[player], names)
            for player, names in task.players(params).items()
        }
    for loss, names in losses.values():
        values = [params[name].clone().requires_grad_() for name in names]

        def of_values(*given: Tensor, loss: Any = loss, names: Any = names) -> Tensor:
            return loss({**params, **dict(zip(names, given, strict=True))})

        assert torch.autograd.gradcheck(of_values, values, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_judged_loss_is_a_finite_scalar_that_vmaps(task: Task) -> None:
    params, buffers = copies(task)
    split = task.valid if len(task.valid.tensors) else task.train
    batch = split.take(torch.arange(min(8, len(split)))) | ({"random": torch.tensor(3)} if task.stochastic else {})
    losses = vmap(lambda p, b: task.loss(p, batch | b))(params, buffers | tree.map_tree(
        lambda c: c.expand(COPIES, *c.shape), dict(task.config)))  # fmt: skip
    assert losses.shape == (COPIES,) and bool(torch.isfinite(losses).all())
    for k in range(COPIES):
        alone = task.loss(tree.index(params, k), batch | tree.index(buffers, k))
        torch.testing.assert_close(losses[k], alone, rtol=1e-5, atol=1e-5)


def test_judged_loss_is_a_mean_over_examples(task: Task) -> None:
    """Or the loss of a split would depend on how it is cut into chunks; the last chunk may hold a single example."""
    split = task.valid
    params, buffers = task.init(generator(0)), task.buffers()

    def judged(indices: Tensor) -> Tensor:
        drawn = {"random": torch.tensor(3)} if task.stochastic else {}
        return task.loss(params, split.take(indices) | drawn | buffers)

    assert bool(torch.isfinite(judged(torch.tensor([0]))))
    if not task.stochastic:  # else the draws differ between chunks
        parts = (5 * judged(torch.arange(5)) + judged(torch.tensor([5]))) / 6
        torch.testing.assert_close(judged(torch.arange(6)), parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_normalized_losses_are_finite_and_bounded(task: Task, bad: float) -> None:
    normalized = float(task.normalize(torch.tensor(bad)))
    assert abs(normalized) <= 1.5
    if bad != -math.inf:
        assert normalized == pytest.approx(1.5), "diverging counts as the worst"


def test_initial_parameters_follow_the_seed_and_nothing_else(task: Task) -> None:
    before = torch.get_rng_state()
    one, again, other = (task.init(generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in one.values())


def test_every_parameter_has_its_role_and_shape(task: Task) -> None:
    params, info = task.init(generator(0)), task.info()
    assert info.keys() == params.keys()
    for name, p in params.items():
        assert info[name].shape == tuple(p.shape) and info[name].role in ROLES


def test_two_builds_of_one_name_are_the_same_task(task: Task) -> None:
    again = registry.create("task", task.name)
    for split in ("train", "valid", "test"):
        mine, theirs = getattr(task, split), getattr(again, split)
        assert len(mine) == len(theirs)
        torch.testing.assert_close(mine.tensors, theirs.tensors, rtol=0, atol=0)
    seeds = torch.tensor([2**40, -3])
    torch.testing.assert_close(batches(task, seeds, 4), batches(again, seeds, 4), rtol=0, atol=0)


@torch.no_grad()
def test_an_antithetic_pair_sees_the_same_losses_and_a_resumed_run_goes_on_to_the_bit(task: Task) -> None:
    rule = registry.create("optimizer", "adamw", lr=1e-3)
    begin = start(task, rule, torch.tensor([11, 11, -4]))
    whole, end = unroll(task, rule, begin, 3, backend="eager")
    assert torch.equal(whole[0], whole[1]), "runs of one seed draw the same batches and the same noise"
    first, middle = unroll(task, rule, begin, 1, backend="eager")
    second, again = unroll(task, rule, Carry.from_tree(middle.tree()), 2, backend="eager")
    assert torch.equal(whole, torch.cat([first, second], 1))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(end.tree()), tree.leaves(again.tree()), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampled_member_trains_and_is_determined_by_its_seed(family: str) -> None:
    made = registry.create("task", family)
    assert isinstance(made, TaskFamily)
    one, again = made.sample(generator(7)), made.sample(generator(7))
    params = one.init(generator(0))
    batch = tree.index(batches(one, torch.tensor([1])), 0)
    grads, (loss, _) = grad_and_value(one.training_loss, has_aux=True)(params, one.buffers(), batch)
    assert bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in grads.values())
    assert any(bool(g.any()) for g in grads.values())
    other = again.training_loss(params, again.buffers(), tree.index(batches(again, torch.tensor([1])), 0))[0]
    torch.testing.assert_close(loss, other, rtol=0, atol=0)
