"""Diffusion: schedules keep variance, targets are what they say, and the lowest loss is that of the true posterior."""

import pytest
import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt_tasks.diffusion import SCHEDULES, TARGETS, diffusion, lowest_loss


@pytest.mark.parametrize("schedule", ["cosine", "linear", "log_uniform"])
def test_schedules_preserve_variance_and_lose_signal(schedule: str) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    signal, noise = SCHEDULES[schedule](t)
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones_like(t))
    assert bool((signal.diff() < 0).all()) and float(signal[0]) > 0.95 and float(signal[-1]) < 0.1


def test_linear_schedule_is_the_limit_of_ddpm() -> None:
    """Ho et al.'s product of 1 - beta over 1,000 steps, beta from 1e-4 to 0.02."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(SCHEDULES["linear"](t)[0], kept, rtol=0, atol=0.005)


def test_flow_target_is_the_derivative_along_the_straight_path() -> None:
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    ahead, behind = SCHEDULES["straight"](t + 1e-6), SCHEDULES["straight"](t - 1e-6)
    slopes = tuple((a - b) / 2e-6 for a, b in zip(ahead, behind, strict=True))
    torch.testing.assert_close(slopes, TARGETS["flow"](*SCHEDULES["straight"](t)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("predicts", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lowest_loss_of_gaussian_data_is_the_linear_regression_of_the_target(
    schedule: str, predicts: str, gaussian_source: str
) -> None:
    """For standard normal x, E[target | x_t] is linear in x_t: the residual variance has a closed form."""
    t = torch.linspace(0.01, 0.99, 20001, dtype=torch.float64)
    signal, noise = SCHEDULES[schedule](t)
    of_x, of_e = TARGETS[predicts](signal, noise)
    covariance = of_x * signal + of_e * noise
    exact = (of_x**2 + of_e**2 - covariance**2 / (signal**2 + noise**2)).mean()
    assert lowest_loss(gaussian_source, schedule, predicts) == pytest.approx(float(exact), rel=0.08)


@pytest.fixture
def gaussian_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.getbasetemp() / "gaussian"
    folder.mkdir(exist_ok=True)
    path = folder / "source.py"
    path.write_text(
        "import torch\nfrom metaopt.task import Split\n"
        "def gaussian(device='cpu'):\n"
        "    x = torch.randn(6000, 2, generator=torch.Generator().manual_seed(3))\n"
        "    return {name: Split({'input': x}) for name in ('train', 'valid', 'test')}\n"
    )
    return f"{path}:gaussian"


def test_loss_of_a_network_that_says_zero_normalizes_to_one() -> None:
    for predicts in TARGETS:
        task = diffusion(predicts=predicts, schedule="straight")
        silent = {name: torch.zeros_like(p) for name, p in task.init(Generator().manual_seed(0)).items()}
        loss = task.loss(silent, task.train.tensors | {"random": torch.tensor(5)})
        assert float(task.normalize(loss)) == pytest.approx(1, abs=0.05)


def test_times_and_noise_follow_the_key() -> None:
    task = registry.create("task", "moons2d_diffusion")
    params, batch = task.init(Generator().manual_seed(0)), task.valid.take(torch.arange(64))

    def loss(key: int) -> Tensor:
        return task.loss(params, batch | {"random": torch.tensor(key)})

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="schedule must be one of"):
        diffusion(schedule="quadratic")
