"""The contract of a task: quadratics that are checked by hand, data by index, and modules as tasks."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap

from metaopt import registry, tree
from metaopt.random import hash64, normal, sample_indices, step_keys, uniform
from metaopt.rule import Params
from metaopt.task import Batch, Split, Task, stack_configs
from metaopt_tasks.quadratic import QuadraticFamily

COPIES = 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_batch(task: Task, copies: int = 1) -> Batch:
    """Tensors [copies, batch_size, ...]."""
    seeds = torch.arange(copies)
    return task.train.take(sample_indices(seeds, torch.zeros_like(seeds), task.batch_size, len(task.train)))


def whole(split: Split) -> Batch:
    return split.take(torch.arange(len(split)))


# Classifiers


CLASSIFIERS = ["digits_mlp", "digits_mlp_tanh", "digits_conv", "char_lm"]


@pytest.fixture(params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest) -> Task:
    return registry.create("task", request.param)


def test_a_fresh_model_guesses_and_its_normalized_loss_is_near_one(classifier: Task) -> None:
    losses = [classifier.loss(classifier.init(generator(s)), tree.index(first_batch(classifier), 0)) for s in range(3)]
    for loss in losses:
        assert loss.shape == () and loss.dtype == torch.float32
        assert float(classifier.normalize(loss)) == pytest.approx(1.0, abs=0.1)


def test_hypergradients_flow_through_a_vmapped_inner_step(classifier: Task) -> None:
    params = tree.stack([classifier.init(generator(seed)) for seed in range(COPIES)])
    batch = first_batch(classifier, COPIES)

    def loss_after_one_step(lr: Tensor) -> Tensor:
        grads = vmap(grad(classifier.loss))(params, batch)
        return vmap(classifier.loss)(tree.map_tree(lambda p, g: p - lr * g, params, grads), batch).double().sum()

    lr, h = torch.tensor(1e-3), 1e-4
    slope = (loss_after_one_step(lr + h) - loss_after_one_step(lr - h)) / (2 * h)
    assert float(grad(loss_after_one_step)(lr)) == pytest.approx(float(slope), rel=0.05)


def test_roles_of_the_models_are_exact() -> None:
    def by_role(name: str, role: str) -> set[str]:
        return {param for param, info in registry.create("task", name).info().items() if info.role == role}

    assert by_role("digits_mlp", "input") == {"fc1.weight"}
    assert by_role("digits_mlp", "output") == {"fc2.weight"}
    assert by_role("digits_conv", "hidden") == {"conv2.weight"}


# Quadratics


def test_quadratic_loss_at_the_known_optimum_is_the_optimal_loss_and_its_gradient_zero() -> None:
    task = QuadraticFamily(optimal_loss=-2.5).sample(generator(3))
    at_optimum, loss = grad_and_value(task.loss)(task.optimum(), {})
    assert float(loss) == task.optimal_loss == -2.5
    assert float(task.normalize(loss)) == 0
    assert not at_optimum["x"].any()


def test_quadratic_gradient_is_a_times_the_offset() -> None:
    task = QuadraticFamily().sample(generator(3))
    params = task.init(generator(0))
    expected = task.config["A"] @ (params["x"] - task.config["x_star"])
    torch.testing.assert_close(grad(task.loss)(params, {})["x"], expected)


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e4])
def test_quadratic_has_exactly_the_asked_condition_number_and_starts_near_one(condition: float) -> None:
    family = QuadraticFamily(dim=12, condition=condition)
    tasks = [family.sample(generator(seed)) for seed in range(50)]
    eigenvalues = torch.linalg.eigvalsh(tasks[0].config["A"].double())
    assert float(eigenvalues[0]) == pytest.approx(1.0, rel=1e-2)
    assert float(eigenvalues[-1]) == pytest.approx(condition, rel=1e-4)
    starts = [task.loss(task.init(generator(seed)), {}) / task.scale for seed, task in enumerate(tasks)]
    assert float(torch.stack(starts).mean()) == pytest.approx(1.0, abs=0.3)


def test_members_of_the_quadratic_family_stack_under_vmap() -> None:
    family = QuadraticFamily(dim=5, noise=0.1, batch_size=4)
    tasks = [family.sample(generator(seed)) for seed in range(COPIES)]
    params = [task.init(generator(seed)) for seed, task in enumerate(tasks)]
    data = first_batch(tasks[0], COPIES)
    losses = vmap(tasks[0].loss, in_dims=0)(tree.stack(params), {**data, **stack_configs(tasks)})
    expected = [task.loss(p, tree.index(data, k)) for k, (task, p) in enumerate(zip(tasks, params, strict=True))]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_quadratic_noise_has_the_asked_size_and_no_mean_and_spares_evaluation() -> None:
    family = QuadraticFamily(noise=0.5, batch_size=16)
    task, other = family.sample(generator(0)), family.sample(generator(1))
    noise = task.train.tensors["noise"]
    assert noise is other.train.tensors["noise"], "members share one table, or they would not stack"
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert float(noise.mean(0).abs().max()) < 1e-6
    assert whole(task.test) == whole(task.valid) == {}
    params = task.init(generator(0))
    expected = grad(task.loss)(params, {})["x"] + noise[:16].mean(0)
    torch.testing.assert_close(grad(task.loss)(params, {"noise": noise[:16]})["x"], expected)


# Bad input


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"one length, got \{'a': 2, 'b': 3\}"):
        Split({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="condition must be at least 1"):
        QuadraticFamily(condition=0.5)
    with pytest.raises(ValueError, match="must hold a 'train' split"):
        Task.from_module(nn.Linear(1, 1), nn.functional.mse_loss, {"test": (torch.zeros(1), torch.zeros(1))})


# Sampling


def test_sampled_indices_are_uniform() -> None:
    size, copies, batch = 97, 50, 400
    seeds = torch.arange(copies)
    indices = sample_indices(seeds, seeds % 3, batch, size)
    counts = indices.flatten().bincount(minlength=size).double()
    expected = copies * batch / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees = size - 1
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_sampled_indices_are_a_pure_function_of_seed_and_step() -> None:
    seeds, steps = torch.tensor([3, 3, 4, 3]), torch.tensor([5, 6, 5, 5])
    a, next_step, other_seed, again = sample_indices(seeds, steps, 32, 1000)
    assert torch.equal(a, again)
    assert not torch.equal(a, next_step) and not torch.equal(a, other_seed)
    alone = sample_indices(seeds[1:2], steps[1:2], 32, 1000)[0]
    assert torch.equal(alone, next_step), "the other copies in a batch change nothing"
    assert torch.equal(a[:8], sample_indices(seeds[:1], steps[:1], 8, 1000)[0])


def test_neighbouring_seeds_and_steps_do_not_share_batches() -> None:
    grid = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    indices = sample_indices(grid[:, 0], grid[:, 1], 8, 2**31)
    assert len(indices.unique()) > 0.999 * indices.numel()


def test_sampled_indices_stay_in_range_for_extreme_seeds_and_sizes() -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    for size in (1, 2, 1797, 2**31):
        indices = sample_indices(seeds, torch.full_like(seeds, 2**62), 64, size)
        assert indices.dtype == torch.int64
        assert int(indices.min()) >= 0 and int(indices.max()) < size


def test_hash64_is_the_published_splitmix64() -> None:
    first_output_of_seed_zero = 0xE220A8397B1DCDAF
    assert int(hash64(torch.tensor(0))) & (2**64 - 1) == first_output_of_seed_zero


def test_keyed_numbers_are_uniform_and_normal_and_a_function_of_key_and_stream() -> None:
    keys = step_keys(torch.tensor([3, 3, 4]), torch.tensor([5, 6, 5]))
    assert len(keys.unique()) == 3
    flat = uniform(keys[0], (200_000,))
    assert float(flat.min()) > 0 and float(flat.max()) < 1
    counts = (flat * 50).long().bincount(minlength=50).double()
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 49 + 5 * math.sqrt(2 * 49)
    bell = normal(keys[0], (400, 500), dtype=torch.float64)
    assert abs(float(bell.mean())) < 5 / math.sqrt(bell.numel())
    assert float(bell.var()) == pytest.approx(1, abs=0.02) and float((bell**4).mean()) == pytest.approx(3, abs=0.1)
    assert torch.equal(uniform(keys[0], (7,), 2), uniform(keys[0], (7,), 2))
    others = [
        uniform(keys[0], (1000,), 1),
        uniform(keys[1], (1000,)),
        uniform(keys[2], (1000,)),
        normal(keys[0], (1000,)),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([flat[:1000], other]))[0, 1])) < 0.15
    stacked = vmap(lambda key: normal(key, (3, 2), 4))(keys)
    torch.testing.assert_close(stacked[1], normal(keys[1], (3, 2), 4), rtol=0, atol=0)


# Tasks from modules


class CustomInit(nn.Module):
    """A module whose constructor, not its layers, decides the initial values."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        nn.init.constant_(self.head.weight, 7.0)
        self.scale = nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.scale


def regression() -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": (torch.randn(10, 3, generator=generator(0)), torch.randn(10, 2, generator=generator(1)))}


def test_a_module_task_has_the_loss_of_its_module() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    roles = {"0.weight": "input", "2.weight": "output"}
    task = Task.from_module(module, nn.functional.mse_loss, regression(), batch_size=5, roles=roles)
    inputs, targets = regression()["train"]
    params: Params = {name: p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(task.loss(params, whole(task.train)), nn.functional.mse_loss(module(inputs), targets))
    assert task.test is task.train and task.batch_size == 5
    assert task.info()["0.weight"].role == "input" and task.info()["2.weight"].role == "output"


@pytest.mark.parametrize("module", [nn.Linear(3, 2), CustomInit], ids=["module", "factory"])
def test_a_module_task_draws_fresh_parameters_by_seed_and_leaves_the_users_module_alone(module: nn.Module) -> None:
    before = {} if module is CustomInit else {k: v.clone() for k, v in module.state_dict().items()}
    rng = torch.get_rng_state()
    task = Task.from_module(module, nn.functional.mse_loss, regression())
    one, again, other = (task.init(generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_a_module_factory_keeps_the_constructors_own_initialisation() -> None:
    params = Task.from_module(CustomInit, nn.functional.mse_loss, regression()).init(generator(0))
    assert bool((params["head.weight"] == 7.0).all())


def test_a_module_task_runs_vmapped() -> None:
    task = Task.from_module(CustomInit, nn.functional.mse_loss, regression())
    copies = [task.init(generator(seed)) for seed in range(COPIES)]
    batch = first_batch(task, COPIES)
    losses = vmap(task.loss)(tree.stack(copies), batch)
    expected = [task.loss(params, tree.index(batch, k)) for k, params in enumerate(copies)]
    torch.testing.assert_close(losses, torch.stack(expected))
