"""GANs: the players' losses are the papers', each player feels its own, and the outcome is judged by a true distance."""

import math

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor
from torch.func import grad

from metaopt import registry
from metaopt.random import normal
from metaopt.rule import Params
from metaopt.task import Batch, Split
from metaopt.unroll import start, unroll
from metaopt_tasks.gan import CRITERIA, GAN, energy_distance, gan


def game(**arguments: object) -> tuple[GAN, Params, Batch]:
    task = gan(generator_hidden=(8,), critic_hidden=(8,), activation="tanh", batch_size=16, **arguments)  # type: ignore[arg-type]
    params = {name: 2 * p.double() for name, p in task.init(Generator().manual_seed(1)).items()}
    batch = {"input": task.train.tensors["input"][:16].double(), "random": torch.tensor(7)}
    return task, params, batch


def test_energy_distance_on_a_line_is_twice_cramers() -> None:
    """Szekely and Rizzo 2013: in one dimension it is 2 int (F - G)^2; scipy takes the root of that, and is biased."""
    generator = Generator().manual_seed(0)
    x, y = torch.randn(300, 1, generator=generator).double(), 0.5 + torch.rand(200, 1, generator=generator).double()
    biased = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    own = [float(torch.cdist(z, z).sum()) / len(z) ** 2 for z in (x, y)]  # scipy's V-statistic to our U-statistic
    expected = biased + sum(d - d * len(z) / (len(z) - 1) for d, z in zip(own, (x, y), strict=True))
    assert float(energy_distance(x, y)) == pytest.approx(expected, rel=1e-6)


def test_energy_distance_of_parts_averages_to_that_of_one_distribution() -> None:
    """Evaluation cuts a split into chunks: their size must not move the judged loss."""
    x, y = (torch.randn(4096, 2, generator=Generator().manual_seed(seed)) + seed for seed in (0, 1))
    whole = float(energy_distance(x[:2048], y[:2048]))
    parts = torch.stack([energy_distance(a, b) for a, b in zip(x.split(16), y.split(16), strict=True)])
    assert abs(float(parts.mean()) - whole) < 4 * float(parts.std()) / math.sqrt(len(parts))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_losses_are_the_textbooks(criterion: str) -> None:
    task, params, batch = game(criterion=criterion)
    real = task.score(params, batch["input"])
    fake = task.score(params, task.generate(params, normal(batch["random"], (16, 2), 0, torch.float64)))
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = {
        "nonsaturating": (bce(real, ones) + bce(fake, zeros), bce(fake, ones)),
        "least_squares": (((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2, ((fake - 1) ** 2).mean() / 2),
        "hinge": ((1 - real).clamp(0).mean() + (1 + fake).clamp(0).mean(), -fake.mean()),
        "wasserstein": (fake.mean() - real.mean(), -fake.mean()),
    }[criterion]
    losses = task.player_losses(params, {}, batch)
    torch.testing.assert_close((losses["critic"], losses["generator"]), expected)


@pytest.mark.parametrize("criterion", ["nonsaturating", "wasserstein"])
def test_each_player_follows_its_own_gradient(criterion: str) -> None:
    task, params, batch = game(criterion=criterion, penalty=0.5)
    together = grad(lambda p: task.training_loss(p, {}, batch)[0])(params)
    for player, names in task.players(params).items():
        alone = grad(lambda p, player=player: task.player_losses(p, {}, batch)[player])(params)
        for name in names:
            torch.testing.assert_close(together[name], alone[name])
    named = [name for names in task.players(params).values() for name in names]
    assert sorted(named) == sorted(params)


@pytest.mark.parametrize("criterion", ["nonsaturating", "wasserstein"])
def test_penalty_is_the_squared_gradient_at_real_points(criterion: str) -> None:
    task, params, batch = game(criterion=criterion, penalty=0.5)
    plain = game(criterion=criterion)[0].player_losses(params, {}, batch)["critic"]
    points = batch["input"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(task.score(params, points).sum(), points)
    expected = plain + 0.25 * slope.square().sum(1).mean()
    torch.testing.assert_close(task.player_losses(params, {}, batch)["critic"], expected)


def test_a_clipped_critic_cannot_be_steeper_than_its_bound() -> None:
    task = gan(critic_hidden=(), criterion="wasserstein", clip=0.1)
    params = task.init(Generator().manual_seed(0)) | {"critic.head.weight": torch.tensor([[500.0, 0.01]])}
    scores = task.score(params, torch.eye(2)) - task.score(params, torch.zeros(2, 2))
    torch.testing.assert_close(scores, torch.tensor([0.1, 0.1 * math.tanh(0.1)]), rtol=1e-5, atol=1e-7)


def test_collapse_normalizes_to_one_and_perfection_to_almost_nothing() -> None:
    task: GAN = registry.create("task", "eight_gaussians2d_gan")
    real = task.test.tensors["input"]

    def normalized(points: Tensor) -> float:
        return float(task.normalize(energy_distance(real, points)))

    assert normalized(torch.zeros_like(real)) == pytest.approx(1, abs=0.05)
    assert normalized(task.valid.tensors["input"]) < 0.1
    gaussian = torch.randn(real.shape, generator=Generator().manual_seed(0))
    assert 0.1 < normalized(gaussian) < 0.5, "same moments are better than collapse, and not the answer"


def test_slope_of_the_normalized_loss_is_finite_at_and_below_zero() -> None:
    for value in (-1.0, 0.0, 1e-9, 10.0):
        slope = grad(gan().normalize)(torch.tensor(value))
        assert bool(torch.isfinite(slope))


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="criterion must be one of"):
        gan(criterion="jensen")
    with pytest.raises(ValueError, match="penalty and clip must be 0 or above"):
        gan(penalty=-1.0)


def test_a_meta_gradient_through_a_game_sees_the_coupling_of_the_players() -> None:
    task = registry.create("task", "eight_gaussians2d_gan")
    rule = registry.create("optimizer", "sgd")

    def judged(log_lr: Tensor) -> Tensor:
        runs = start(task, rule, torch.arange(2))
        runs.params = {name: value.double() for name, value in runs.params.items()}
        _, runs = unroll(task, rule, runs, 4, hp={"lr": log_lr.exp()}, backend="eager")
        return sum(value.square().sum() for value in runs.params.values())

    task.train = Split({name: value.double() for name, value in task.train.tensors.items()})
    at, h = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True), 1e-5
    (found,) = torch.autograd.grad(judged(at), at)
    numeric = (judged(at.detach() + h) - judged(at.detach() - h)) / (2 * h)
    torch.testing.assert_close(found, numeric.detach(), rtol=1e-5, atol=0)
