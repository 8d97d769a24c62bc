"""An augmented task trains on changed gradients, data or units, and is judged as the task inside."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import grad, grad_and_value, vmap

from metaopt import registry, tree
from metaopt.random import hash64, sample_indices, step_keys
from metaopt.rule import Params
from metaopt.task import Batch, Task
from metaopt.unroll import start, unroll
from metaopt_tasks.augment import Cast, LabelNoise, ReducedBatch, Reparametrized
from metaopt_tasks.augment_gradients import DelayedGradients, GradientNoise, LossScale, NormalizedGradients
from metaopt_tasks.mlp import mlp_classifier
from metaopt_tasks.quadratic import quadratic

KEYS = hash64(torch.arange(4000))


@cache
def classifier() -> Task:
    return mlp_classifier("iris_mlp", data="iris", hidden=(8,), activation="tanh", batch_size=16, horizon=100)


@cache
def bowl() -> Task:
    return quadratic("bowl", dim=5, condition=10.0)


WRAPPED = {
    "reparam_global": lambda: Reparametrized(classifier(), "global", 0.1, 10.0),
    "reparam_tensor": lambda: Reparametrized(classifier(), "tensor", 0.1, 10.0),
    "reparam_parameter": lambda: Reparametrized(classifier(), "parameter", 0.1, 10.0),
    "batch": lambda: ReducedBatch(classifier(), 0.25),
    "noise": lambda: GradientNoise(classifier(), 0.5),
    "noise_absolute": lambda: GradientNoise(classifier(), 0.5, relative=False),
    "normalized": lambda: NormalizedGradients(classifier()),
    "delay": lambda: DelayedGradients(classifier(), 2),
    "cast": lambda: Cast(classifier()),
    "flip": lambda: LabelNoise(classifier(), 0.3),
    "scale": lambda: LossScale(classifier(), 10.0),
    "all": lambda: DelayedGradients(
        NormalizedGradients(
            GradientNoise(LossScale(Cast(LabelNoise(ReducedBatch(Reparametrized(classifier()), 0.5), 0.1)), 10.0), 0.1)
        ),
        3,
    ),
}


@pytest.fixture(params=WRAPPED)
def wrapped(request: pytest.FixtureRequest) -> Task:
    return WRAPPED[request.param]()


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def first_batch(task: Task, size: int = 16, key: int = 3) -> Batch:
    split = task.train
    taken = split.take(torch.arange(size)) if split.tensors else {}
    return taken | task.config | {"random": hash64(torch.tensor(key))}


def gradients(task: Task, params: Params, batch: Batch) -> Params:
    return grad(lambda p: task.training_loss(p, task.buffers(), batch)[0])(params)


def double(values: Any) -> Any:
    return tree.map_tree(lambda t: t.double() if t.is_floating_point() else t, values)


def test_judging_and_roles_are_those_of_the_task_inside(wrapped: Task) -> None:
    inside = classifier()
    params, batch = inside.init(generator()), wrapped.valid.take(torch.arange(8))
    own = wrapped.init(generator())
    torch.testing.assert_close(wrapped.loss(own, batch), inside.loss(params, batch), rtol=1e-5, atol=1e-6)
    assert wrapped.info() == inside.info()
    assert wrapped.name.startswith("iris_mlp+")
    for bad in (math.nan, math.inf, 0.3):
        assert wrapped.normalize(torch.tensor(bad)) == inside.normalize(torch.tensor(bad))


def test_copies_side_by_side_equal_copies_one_after_the_other(wrapped: Task) -> None:
    rule = registry.create("optimizer", "sgd", lr=0.01)
    begin = start(wrapped, rule, torch.arange(3))
    with torch.no_grad():
        eager, end = unroll(wrapped, rule, begin, 4, backend="eager")
    loop, other = unroll(wrapped, rule, begin, 4, backend="loop")
    rough = "bfloat16" in wrapped.name
    close = {"rtol": 0.05, "atol": 0.05} if rough else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(eager, loop, **close)
    torch.testing.assert_close(end.params, other.params, **close)


def test_moving_a_wrapper_moves_everything_and_leaves_the_original(wrapped: Task) -> None:
    moved = wrapped.to("meta")
    assert moved.device.type == moved.task.device.type == "meta"  # type: ignore[attr-defined]
    assert all(b.device.type == "meta" for b in moved.buffers().values())
    assert wrapped.device.type == "cpu"
    assert moved.name == wrapped.name and moved.batch_size == wrapped.batch_size


@pytest.mark.parametrize("level", ["global", "tensor", "parameter"])
def test_reparametrised_gradients_obey_the_chain_rule(level: str) -> None:
    inside, task = classifier(), Reparametrized(classifier(), level, 0.1, 10.0, seed=4)
    params, own, batch = double(inside.init(generator())), double(task.init(generator())), double(first_batch(inside))
    for name, p in task.scaled(own).items():
        torch.testing.assert_close(p, params[name], rtol=1e-6, atol=0)
    expected = gradients(inside, task.scaled(own), batch)
    for name, g in gradients(task, own, batch).items():
        torch.testing.assert_close(g, task.scales[name].double() * expected[name], rtol=1e-12, atol=0)
    drawn = torch.cat([scale.reshape(-1) for scale in task.scales.values()])
    assert bool((drawn >= 0.1).all()) and bool((drawn <= 10).all())
    distinct = {"global": 1, "tensor": len(params), "parameter": sum(p.numel() for p in params.values())}
    assert len(drawn.unique()) == distinct[level]


@torch.no_grad()
def test_sgd_on_rescaled_parameters_is_sgd_with_the_rate_times_the_square_of_the_scale() -> None:
    task = Reparametrized(bowl(), "global", 3.0, 3.0)
    sgd, seeds = registry.create("optimizer", "sgd"), torch.arange(2)
    own, _ = unroll(task, sgd, start(task, sgd, seeds), 10, hp={"lr": 1e-3})
    inside, _ = unroll(bowl(), sgd, start(bowl(), sgd, seeds), 10, hp={"lr": 9e-3})
    torch.testing.assert_close(own, inside, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_loss_scale_multiplies_the_rate_of_sgd_and_leaves_the_loss() -> None:
    task, sgd, seeds = LossScale(classifier(), 10.0), registry.create("optimizer", "sgd"), torch.arange(2)
    own, _ = unroll(task, sgd, start(task, sgd, seeds), 10, hp={"lr": 1e-3})
    inside, _ = unroll(classifier(), sgd, start(classifier(), sgd, seeds), 10, hp={"lr": 1e-2})
    torch.testing.assert_close(own, inside, rtol=1e-4, atol=1e-6)


def test_reduced_batch_takes_the_fraction_and_at_least_one() -> None:
    assert [ReducedBatch(classifier(), f).batch_size for f in (1.0, 0.5, 0.001)] == [16, 8, 1]
    assert classifier().batch_size == 16


@pytest.mark.parametrize("relative", [True, False])
def test_gradient_noise_has_mean_zero_and_the_asked_standard_deviation(relative: bool) -> None:
    task = GradientNoise(classifier(), 0.5, relative=relative)
    params, batch = task.init(generator()), first_batch(task)
    clean, loss = grad_and_value(classifier().loss)(params, batch)
    step = grad_and_value(lambda p, key: task.training_loss(p, {}, batch | {"random": key})[0])
    noisy, losses = vmap(step, in_dims=(None, 0))(params, KEYS)
    torch.testing.assert_close(losses, loss.expand(len(KEYS)), msg="the value stays")
    draws = {}
    for name, g in clean.items():
        std = 0.5 * (float(g.square().mean().sqrt()) if relative else 1.0)
        draws[name] = ((noisy[name] - g) / std).flatten(1)
        assert float(draws[name].mean(0).abs().max()) < 5 / math.sqrt(len(KEYS))
        torch.testing.assert_close(draws[name].std(0), torch.ones(g.numel()), rtol=0, atol=5 / math.sqrt(2 * len(KEYS)))
    together = torch.cat(list(draws.values()), 1)
    correlation = torch.corrcoef(together.T) - torch.eye(together.shape[1])
    assert float(correlation.abs().max()) < 6 / math.sqrt(len(KEYS)), "coordinates are independent"


def test_nested_wrappers_draw_different_numbers() -> None:
    task = GradientNoise(GradientNoise(bowl(), 1.0, relative=False), 1.0, relative=False)
    params, batch = bowl().init(generator()), bowl().config
    clean = grad(bowl().loss)(params, batch)["x"]
    noisy = vmap(lambda key: gradients(task, params, batch | {"random": key})["x"])(KEYS)
    torch.testing.assert_close((noisy - clean).std(), torch.tensor(math.sqrt(2)), rtol=0.03, atol=0)


def test_normalized_gradients_have_norm_one_and_the_same_direction() -> None:
    task, inside = NormalizedGradients(classifier()), classifier()
    params, batch = inside.init(generator()), first_batch(inside)
    flat = {t: torch.cat([g.flatten() for g in gradients(t, params, batch).values()]) for t in (task, inside)}
    torch.testing.assert_close(flat[task], flat[inside] / flat[inside].norm())
    at_rest = gradients(NormalizedGradients(bowl()), bowl().optimum(), bowl().config)["x"]  # type: ignore[attr-defined]
    assert torch.equal(at_rest, torch.zeros(5))


def test_curvature_through_changed_gradients_equals_finite_differences() -> None:
    task = NormalizedGradients(bowl())
    x, config = bowl().init(generator())["x"].double(), double(bowl().config)

    def of_x(x: Tensor) -> Tensor:
        return grad(lambda p: task.training_loss({"x": p}, {}, config)[0])(x)

    torch.testing.assert_close(
        torch.func.jacrev(of_x)(x), torch.autograd.functional.jacobian(of_x, x), rtol=1e-9, atol=1e-12
    )
    numeric = torch.stack([(of_x(x + h) - of_x(x - h)) / 2e-6 for h in 1e-6 * torch.eye(5, dtype=torch.float64)], 1)
    torch.testing.assert_close(torch.func.jacrev(of_x)(x), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("delay", [1, 3, 8])
@torch.no_grad()
def test_delayed_gradients_are_those_of_that_many_steps_ago(delay: int) -> None:
    task, inside, lr, steps = DelayedGradients(classifier(), delay), classifier(), 0.1, 12
    sgd = registry.create("optimizer", "sgd", lr=lr)
    carry = start(task, sgd, [7])
    trail, computed = [tree.index(carry.params, 0)], []
    for t in range(steps):
        batch = inside.train.take(unrolled_indices(task, seed=7, step=t))
        computed.append(grad(inside.loss)(trail[-1], batch))
        losses, carry = unroll(task, sgd, carry, 1)
        torch.testing.assert_close(losses[0, 0], inside.loss(trail[-1], batch), msg="the value is not delayed")
        trail.append(tree.index(carry.params, 0))
    for t in range(steps):
        for name in trail[0]:
            moved = (trail[t][name] - trail[t + 1][name]) / lr
            expected = computed[t - delay][name] if t >= delay else torch.zeros_like(moved)
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=2e-5)


def unrolled_indices(task: Task, seed: int, step: int) -> Tensor:
    return sample_indices(torch.tensor([seed]), torch.tensor([step]), task.batch_size, len(task.train))[0]


def test_meta_gradient_through_delayed_gradients_equals_finite_differences() -> None:
    task, sgd = DelayedGradients(bowl(), 2), registry.create("optimizer", "sgd")

    def end_loss(lr: Tensor) -> Tensor:
        begin = start(task, sgd, [1])
        begin.params, begin.buffers, begin.config = map(double, (begin.params, begin.buffers, begin.config))
        _, end = unroll(task, sgd, begin, 6, hp={"lr": lr})
        return task.loss(tree.index(end.params, 0), double(task.config))

    lr = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end_loss, [lr])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_low_precision_is_close_and_comes_back_in_the_parameters_dtype(dtype: str, tolerance: float) -> None:
    task, inside = Cast(classifier(), dtype), classifier()
    params, batch = inside.init(generator()), first_batch(inside)
    loss, expected = (t.training_loss(params, {}, batch)[0] for t in (task, inside))
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss - expected)) < tolerance * float(expected)
    found, exact = gradients(task, params, batch), gradients(inside, params, batch)
    for name, g in found.items():
        assert g.dtype == torch.float32
        assert float((g - exact[name]).norm()) < 2 * tolerance * float(exact[name].norm())


def test_labels_flip_at_the_asked_rate_to_every_other_class_alike() -> None:
    task = LabelNoise(classifier(), 0.3)
    batch = first_batch(task, size=len(task.train))
    noisy = vmap(lambda key: task.noisy(batch | {"random": key}))(KEYS[:500])
    flipped = noisy != batch["label"]
    draws = flipped.numel()
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / draws))
    shift = (noisy - batch["label"])[flipped] % 3
    assert float((shift == 1).float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(0.3 * draws))
    assert torch.equal(LabelNoise(classifier(), 0.0).noisy(batch), batch["label"])
    assert not bool((LabelNoise(classifier(), 1.0).noisy(batch) == batch["label"]).any())


@torch.no_grad()
def test_a_wrapped_module_keeps_its_running_statistics_and_its_dropout() -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    data = tuple(classifier().train.tensors[key] for key in ("input", "label"))
    inside = Task.from_module(made, nn.functional.cross_entropy, {"train": data}, batch_size=16)  # type: ignore[dict-item]
    task, frozen = DelayedGradients(GradientNoise(inside, 0.1), 2), registry.create("optimizer", "sgd", lr=0.0)
    assert task.stochastic and inside.buffers().keys() < task.buffers().keys()
    own, end = unroll(task, frozen, start(task, frozen, [1, 2]), 3)
    expected, plain = unroll(inside, frozen, start(inside, frozen, [1, 2]), 3)
    torch.testing.assert_close(own, expected)
    for name, value in plain.buffers.items():
        torch.testing.assert_close(end.buffers[name], value)


@torch.no_grad()
def test_antithetic_copies_see_the_same_noise() -> None:
    task, rule = GradientNoise(LabelNoise(classifier(), 0.5), 1.0), registry.create("optimizer", "sgd", lr=0.1)
    _, carry = unroll(task, rule, start(task, rule, [5, 5, 6]), 5)
    assert torch.equal(carry.params["fc1.weight"][0], carry.params["fc1.weight"][1])
    assert not torch.equal(carry.params["fc1.weight"][0], carry.params["fc1.weight"][2])


def test_a_registered_task_is_augmented_by_name() -> None:
    task = registry.create(
        "task", "digits_mlp_delay4", data="iris", hidden=[8], gradient_noise=0.1, batch_fraction=0.5, horizon=50
    )
    assert task.name == "digits_mlp_delay4" and task.batch_size == 32 and task.horizon == 50 and task.stochastic
    assert [b.shape[0] for b in task.buffers().values()] == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="task must name one task, got 'quadratic'"):
        registry.create("task", "quadratic_20_reparam_parameter", task="quadratic")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reparametrized(bowl(), "row"), "level must be one of global, tensor, parameter, got 'row'"),
        (lambda: Reparametrized(bowl(), "global", 0.0), "0 < low <= high, got 0.0 and 100.0"),
        (lambda: ReducedBatch(bowl(), 0.0), r"fraction must be in \(0, 1\], got 0.0"),
        (lambda: GradientNoise(bowl(), -1.0), "std must be at least 0 and finite, got -1.0"),
        (lambda: DelayedGradients(bowl(), 9), r"delay must be in \[1, 8\], got 9"),
        (lambda: Cast(bowl(), "int8"), "dtype must be one of bfloat16, float16, got 'int8'"),
        (lambda: LabelNoise(bowl(), 0.1), "label noise needs a task with labels, got bowl"),
        (lambda: LabelNoise(classifier(), 1.5), r"rate must be in \[0, 1\], got 1.5"),
        (lambda: LossScale(bowl(), 0.0), "factor must be above 0 and finite, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_keys_of_wrappers_differ_from_those_of_the_task() -> None:
    keys = step_keys(torch.arange(100), torch.zeros(100, dtype=torch.int64))
    task = LabelNoise(classifier(), 0.5)
    derived = torch.stack([task._key({"random": key}) for key in keys])
    assert len(torch.cat([keys, derived]).unique()) == 200
