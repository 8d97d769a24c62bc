"""Autoencoders and variational autoencoders: against torch.nn's modules, closed forms and torch.distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, distributions, nn

from metaopt.random import normal
from metaopt.rule import Params
from metaopt.task import Batch, Task
from metaopt_tasks.autoencoder import autoencoder
from metaopt_tasks.vae import VAE, vae


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def disturbed(params: Params) -> Params:
    """No biases at zero, which would hide mistakes."""
    return {name: p + 0.1 * torch.randn(p.shape, generator=generator(len(name))) for name, p in params.items()}


def images(task: Task, count: int = 6) -> Tensor:
    return task.train.tensors["input"][:count]


def loaded(module: nn.Module, params: Params) -> nn.Module:
    module.load_state_dict(dict(zip(module.state_dict(), params.values(), strict=True)))
    return module


def silenced(params: Params) -> Params:
    """The decoder gives zeros, whatever the code; the posterior is the prior."""
    names = ("code", list(params)[-1].split(".")[0])
    return {name: p * 0 if name.startswith(names) else p for name, p in params.items()}


def everything(task: Task) -> Batch:
    return task.train.take(torch.arange(len(task.train))) | {"random": torch.tensor(3)}


def test_mlp_autoencoder_equals_a_module_of_torch_with_the_same_weights() -> None:
    task = autoencoder(widths=(9, 7), code=3, activation="tanh")
    params = disturbed(task.init(generator(0)))
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3),
        nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 64), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip
    expected = nn.MSELoss()(loaded(module, params)(images(task)), images(task))
    torch.testing.assert_close(task.loss(params, {"input": images(task)}), expected)


def test_conv_autoencoder_equals_a_module_of_torch_with_the_same_weights() -> None:
    task = autoencoder(coder="conv", widths=(3, 5), code=4, criterion="bce")
    params = disturbed(task.init(generator(0)))
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4),
        nn.Linear(4, 20), nn.Unflatten(1, (5, 2, 2)), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(5, 3, 3, 1, 1),
        nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3, 1, 1),
    )  # fmt: skip
    probability = loaded(module, params)(images(task)).sigmoid()
    expected = nn.BCELoss()(probability, task.targets(images(task)))
    torch.testing.assert_close(task.loss(params, {"input": images(task)}), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coder", ["mlp", "conv"])
@pytest.mark.parametrize("data", ["digits", "mnist1d"])
def test_reconstructions_have_the_shape_of_their_inputs(data: str, coder: str) -> None:
    task = autoencoder(data=data, coder=coder, widths=(4, 4, 4), code=2)
    code = task.coder.encode(task.init(generator(0)), images(task))
    assert code.shape == (6, 2)
    assert task.coder.decode(task.init(generator(0)), code).shape == images(task).shape


@pytest.mark.parametrize("make", [autoencoder, vae])
@pytest.mark.parametrize("criterion", ["mse", "bce"])
def test_a_decoder_that_gives_zeros_has_normalized_loss_one(make: Any, criterion: str) -> None:
    task = make(criterion=criterion)
    loss = task.loss(silenced(task.init(generator(0))), everything(task))
    assert float(task.normalize(loss)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("criterion", ["mse", "bce"])
def test_a_perfect_reconstruction_has_normalized_loss_zero(criterion: str) -> None:
    task = autoencoder(criterion=criterion)
    inputs = task.train.tensors["input"].double()
    targets = task.targets(inputs)
    perfect = targets if criterion == "mse" else torch.logit(targets, eps=1e-12)
    assert float(task.normalize(task.reconstruction(perfect, inputs))) == pytest.approx(0.0, abs=1e-6)


def test_bce_targets_are_grey_values_between_zero_and_one() -> None:
    from sklearn.datasets import load_digits

    task = autoencoder(criterion="bce")
    grey = {round(16 * float(value), 3) for value in task.targets(task.train.tensors["input"]).unique()}
    assert grey == {float(value) for value in set(load_digits().data.flatten())}, "digits have 17 shades"


@pytest.mark.parametrize("criterion", ["mse", "bce"])
def test_vae_loss_is_minus_the_evidence_lower_bound_per_pixel(criterion: str) -> None:
    task = vae(criterion=criterion, widths=(9,), code=3, sigma=0.7, activation="silu")
    params = {name: 2 * p for name, p in disturbed(task.init(generator(0))).items()}
    x, key = images(task), torch.tensor(11)
    mean, log_variance = task.coder.encode(params, x).chunk(2, -1)
    posterior = distributions.Normal(mean, (log_variance / 2).exp())
    prior = distributions.Normal(torch.zeros(3), torch.ones(3))
    outputs = task.coder.decode(params, mean + posterior.stddev * normal(key, (6, 3)))
    if criterion == "mse":
        log_likelihood = distributions.Normal(outputs, 0.7).log_prob(x)
    else:
        log_likelihood = distributions.Bernoulli(logits=outputs, validate_args=False).log_prob(task.targets(x))
    bound = log_likelihood.flatten(1).sum(1) - distributions.kl_divergence(posterior, prior).sum(1)
    loss = task.loss(params, {"input": x, "random": key})
    torch.testing.assert_close(loss, -bound.mean() / 64, rtol=1e-4, atol=1e-5)


def test_beta_weighs_the_divergence_alone() -> None:
    batch = {"input": images(vae()), "random": torch.tensor(1)}
    params = disturbed(vae().init(generator(0)))
    losses = [float(vae(beta=beta).loss(params, batch)) for beta in (0.0, 1.0, 2.0)]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert losses[1] > losses[0]


def test_a_linear_vae_cannot_beat_probabilistic_pca_and_comes_close() -> None:
    """The best bound of a linear-Gaussian model is the likelihood of PCA (Lucas et al. 2019, arXiv:1911.02469)."""
    sigma, code = 0.5, 2
    task = vae(criterion="mse", sigma=sigma, code=code, widths=(16,), activation="linear")
    x = task.train.tensors["input"].flatten(1).double()
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x)).flip(0).clamp_min(0)
    kept = eigenvalues[:code]
    best = 0.5 * (kept.log() + 1).sum() + (64 - code) * math.log(sigma) + eigenvalues[code:].sum() / (2 * sigma**2)
    best = float(best + 32 * math.log(2 * math.pi)) / 64
    params = {name: p.requires_grad_() for name, p in task.init(generator(0)).items()}
    adam = torch.optim.Adam(params.values(), lr=1e-2)
    for step in range(300):
        adam.zero_grad()
        rows = torch.randint(len(x), (128,), generator=generator(step))
        task.loss(params, task.train.take(rows) | {"random": torch.tensor(step)}).backward()
        adam.step()
    loss = float(task.loss(params, everything(task)).detach())
    assert best - 0.01 < loss < best + 0.1
    assert loss < task.floor + task.scale * 0.6, "well below a decoder that knows nothing"


def test_noise_follows_the_key_and_nothing_else() -> None:
    task = vae()
    assert VAE.stochastic
    params, x = disturbed(task.init(generator(0))), images(task)
    one, again, other = (float(task.loss(params, {"input": x, "random": torch.tensor(key)})) for key in (1, 1, 2))
    assert one == again != other


def test_roles_tell_which_sides_of_a_matrix_grow_with_the_width() -> None:
    for coder in ("mlp", "conv"):
        narrow, wide = (autoencoder(coder=coder, widths=(w, w), code=3).info() for w in (4, 8))
        grows = {
            name: (wide[name].fan_in > info.fan_in, wide[name].fan_out > info.fan_out) for name, info in narrow.items()
        }
        roles = {(False, True): "input", (True, True): "hidden", (True, False): "output"}
        for name, info in narrow.items():
            if len(info.shape) > 1:
                assert info.role == roles[grows[name]], f"{coder} {name}"


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (autoencoder, {"criterion": "l1"}, "criterion must be one of mse, bce"),
        (autoencoder, {"coder": "rnn"}, "coder must be one of mlp, conv"),
        (autoencoder, {"code": 0}, "must be at least 1, got 0"),
        (autoencoder, {"data": "wine", "coder": "conv"}, r"takes images .* got examples of shape \(13,\)"),
        (vae, {"sigma": 0.0}, "sigma above 0"),
    ],
)
def test_bad_arguments_are_refused_with_the_allowed_ones(make: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
