"""The task suite: what a training problem promises to the unroll, the meta-trainer and the evaluator."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap

from metaopt import tree
from metaopt.rule import ROLES, Params
from metaopt.task import Batch, Split, Task, hash64, sample_indices, stack_configs
from metaopt_tasks.char_lm import TextWindows, char_lm, pydoc_text, vocabulary
from metaopt_tasks.digits import DigitsConv, DigitsMLP, digits, digits_conv, digits_mlp
from metaopt_tasks.quadratic import QuadraticFamily

COPIES = 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy_quadratic() -> Task:
    return QuadraticFamily(dim=6, noise=0.5, batch_size=8).sample(generator(0))


TASKS: dict[str, Callable[[], Task]] = {
    "quadratic": noisy_quadratic,
    "digits_mlp": digits_mlp,
    "digits_mlp_tanh": lambda: digits_mlp(activation="tanh"),
    "digits_conv": digits_conv,
    "char_lm": char_lm,
    "char_lm_tied_2_layers": lambda: char_lm(layers=2, tied=True),
}
CLASSIFIERS = [name for name in TASKS if name != "quadratic"]


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


@pytest.fixture(params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


def first_batch(task: Task, copies: int = 1) -> Batch:
    """Tensors [copies, batch_size, ...]."""
    seeds = torch.arange(copies)
    return task.train.take(sample_indices(seeds, torch.zeros_like(seeds), task.batch_size, len(task.train)))


def whole(split: Split) -> Batch:
    return split.take(torch.arange(len(split)))


def train(task: Task, steps: int, lr: float) -> Params:
    """Plain torch.optim.AdamW on the task's own batches."""
    params = {name: p.requires_grad_() for name, p in task.init(generator(0)).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr)
    for step in range(steps):
        indices = sample_indices(torch.tensor([7]), torch.tensor([step]), task.batch_size, len(task.train))[0]
        optimizer.zero_grad()
        task.loss(params, task.train.take(indices)).backward()
        optimizer.step()
    return tree.detach(params)


# Every task


def test_a_fresh_model_guesses_and_its_normalized_loss_is_near_one(classifier: Task) -> None:
    losses = [classifier.loss(classifier.init(generator(s)), tree.index(first_batch(classifier), 0)) for s in range(3)]
    for loss in losses:
        assert loss.shape == () and loss.dtype == torch.float32
        assert float(classifier.normalize(loss)) == pytest.approx(1.0, abs=0.1)


def test_vmapped_losses_and_gradients_equal_a_loop_over_copies(task: Task) -> None:
    copies = [task.init(generator(seed)) for seed in range(COPIES)]
    batch = first_batch(task, COPIES)
    grads, losses = vmap(grad_and_value(task.loss))(tree.stack(copies), batch)
    for k, params in enumerate(copies):
        expected_grads, expected_loss = grad_and_value(task.loss)(params, tree.index(batch, k))
        torch.testing.assert_close(losses[k], expected_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tree.index(grads, k), expected_grads, rtol=1e-5, atol=1e-5)


def test_hypergradients_flow_through_a_vmapped_inner_step(task: Task) -> None:
    params = tree.stack([task.init(generator(seed)) for seed in range(COPIES)])
    batch = first_batch(task, COPIES)

    def loss_after_one_step(lr: Tensor) -> Tensor:
        grads = vmap(grad(task.loss))(params, batch)
        return vmap(task.loss)(tree.map_tree(lambda p, g: p - lr * g, params, grads), batch).double().sum()

    lr, h = torch.tensor(1e-3), 1e-4
    slope = (loss_after_one_step(lr + h) - loss_after_one_step(lr - h)) / (2 * h)
    assert float(grad(loss_after_one_step)(lr)) == pytest.approx(float(slope), rel=0.05)


def test_initial_parameters_are_determined_by_the_seed(task: Task) -> None:
    one, again, other = (task.init(generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in one.values())


def test_init_does_not_touch_the_global_random_state(task: Task) -> None:
    before = torch.get_rng_state()
    task.init(generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_has_its_role_and_shape(task: Task) -> None:
    params, info = task.init(generator(0)), task.info()
    assert info.keys() == params.keys()
    for name, p in params.items():
        assert info[name].shape == tuple(p.shape)
        assert info[name].role in ROLES
        assert (info[name].role in ("bias", "norm")) == (p.dim() == 1)


def test_roles_of_the_models_are_exact() -> None:
    def by_role(task: Task, role: str) -> set[str]:
        return {name for name, info in task.info().items() if info.role == role}

    assert by_role(digits_mlp(), "input") == {"fc1.weight"}
    assert by_role(digits_mlp(), "output") == {"fc2.weight"}
    assert by_role(digits_conv(), "hidden") == {"conv2.weight"}
    lm = char_lm()
    assert by_role(lm, "embedding") == {"token.embedding", "position.embedding"}
    assert by_role(lm, "output") == {"head.weight"}
    assert by_role(lm, "norm") == {"block0.norm1.weight", "block0.norm2.weight", "norm.weight"}
    assert by_role(lm, "hidden") == {f"block0.{name}.weight" for name in ("qkv", "proj", "fc1", "fc2")}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_normalize_is_finite_and_bounded_for_diverged_losses(task: Task, bad: float) -> None:
    normalized = float(task.normalize(torch.tensor(bad)))
    assert abs(normalized) <= 1.5
    if bad != -math.inf:
        assert normalized == pytest.approx(1.5)


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


# Data


def test_digits_splits_are_disjoint_complete_and_stratified() -> None:
    from sklearn.datasets import load_digits

    splits = digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1258, "valid": 270, "test": 269}
    images = torch.cat([split.tensors["image"] for split in splits.values()])
    original = torch.tensor(load_digits().data)
    assert len(images.unique(dim=0)) == len(original.unique(dim=0)) == len(images) == 1797
    for split in splits.values():
        shares = split.tensors["label"].bincount(minlength=10) / len(split)
        assert float((shares - 0.1).abs().max()) < 0.01
    assert abs(float(splits["train"].tensors["image"].mean())) < 1e-5
    assert float(splits["train"].tensors["image"].std()) == pytest.approx(1.0, abs=1e-5)


def test_text_splits_are_contiguous_and_decode_to_the_documentation() -> None:
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))
    splits = pydoc_text(context=16)
    chars = vocabulary()
    assert len(chars) == len(set(chars)) == 64
    tokens = torch.cat([split.tensors["tokens"] for split in splits.values()])
    decoded = "".join(chars[token] for token in tokens.tolist())
    assert len(decoded) == len(text)
    assert all(a == b for a, b in zip(decoded, text, strict=True) if a != chars[0])
    assert decoded.count(chars[0]) < 0.01 * len(text)


def test_text_windows_cover_every_position_once_in_evaluation_and_overlap_in_training() -> None:
    text = torch.arange(100)
    overlapping, disjoint = TextWindows({"tokens": text}, 8), TextWindows({"tokens": text}, 8, stride=8)
    assert len(overlapping) == 92
    assert whole(overlapping)["tokens"][-1].tolist() == list(range(91, 100))
    targets = whole(disjoint)["tokens"][:, 1:].flatten()
    assert targets.tolist() == list(range(1, 97))
    assert disjoint.take(torch.zeros(2, 3, dtype=torch.int64))["tokens"].shape == (2, 3, 9)
    assert overlapping.to("meta").context == 8, "a moved split is still made of windows"


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"one length, got \{'a': 2, 'b': 3\}"):
        Split({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="less than the split's 5 tokens, got 8"):
        TextWindows({"tokens": torch.arange(5)}, 8)
    with pytest.raises(ValueError, match="activation must be one of relu"):
        digits_mlp(activation="step")
    with pytest.raises(ValueError, match="multiple of heads"):
        char_lm(width=32, heads=3)
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


# Learning


@pytest.mark.parametrize("factory", [digits_mlp, digits_conv])
def test_adamw_reaches_90_percent_on_digits_in_200_steps(factory: Callable[[], DigitsMLP | DigitsConv]) -> None:
    task = factory()
    params = train(task, steps=200, lr=1e-2)
    test = whole(task.test)
    accuracy = (task.logits(params, test["image"]).argmax(-1) == test["label"]).float().mean()
    assert float(accuracy) > 0.9


def test_adamw_beats_the_unigram_entropy_on_text_in_200_steps() -> None:
    task = char_lm()
    params = train(task, steps=200, lr=5e-3)
    test = whole(task.test)
    counts = task.train.tensors["tokens"].bincount(minlength=64) + 1.0
    unigram = -(counts / counts.sum()).log()[test["tokens"][:, 1:]].mean()
    assert float(task.loss(params, test)) < float(unigram) - 0.4


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
