"""Generative adversarial networks on points: min-max games whose outcome is judged by a distance between samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.random import normal
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.load import load
from metaopt_tasks.game import Game
from metaopt_tasks.layers import ACTIVATIONS, mlp, mlp_params
from metaopt_tasks.scales import WORST, ScaledTask

CRITERIA: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "nonsaturating": (
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    "least_squares": (
        lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
        lambda fake: 0.5 * (fake - 1).square().mean(),
    ),
    "hinge": (
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda fake: -fake.mean(),
    ),
    "wasserstein": (lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
}
"""Name -> (loss of the critic by its scores of real and generated points, loss of the generator by the latter).

Goodfellow et al. 2014, arXiv:1406.2661; Mao et al. 2017, arXiv:1611.04076; Lim and Ye 2017, arXiv:1705.02894;
Arjovsky et al. 2017, arXiv:1701.07875.
"""


@dataclass(eq=False)
class GAN(Game, ScaledTask):
    """A generator of points from normal noise against a critic; both MLPs, both moving in every step.

    Attributes:
        generator_hidden, critic_hidden: widths.
        activation: of both; a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: of the hidden weights; a name in `metaopt_tasks.layers.INITIALIZERS`.
        criterion: a name in `CRITERIA`.
        penalty: weight of half the mean |gradient of the critic|^2 at real points (R1 of Mescheder et al. 2018,
            arXiv:1801.04406), with which simultaneous steps converge, as they do not with WGAN-GP's penalty around 1.
        clip: if above 0, the critic sees each of its weights w as clip * tanh(w / clip): a smooth form of WGAN's clipping.
        latent: numbers of noise per point.
    """

    stochastic: ClassVar[bool] = True

    generator_hidden: tuple[int, ...] = (32, 32)
    critic_hidden: tuple[int, ...] = (32, 32)
    activation: str = "relu"
    initializer: str = "normal"
    criterion: str = "nonsaturating"
    penalty: float = 0.0
    clip: float = 0.0
    latent: int = 2

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("criterion", self.criterion, CRITERIA)
        if min(self.penalty, self.clip) < 0:
            raise ValueError(f"penalty and clip must be 0 or above, got {self.penalty} and {self.clip}; 0 is none")
        self._dim = self.train.tensors["input"].shape[1]

    def init(self, generator: Generator) -> Params:
        """``generator.`` and ``critic.`` parameters; the generator's head has gain 1, so its first points have spread."""
        gain = ACTIVATIONS[self.activation][1]
        widths = (self.latent, *self.generator_hidden, self._dim)
        params = mlp_params(widths, generator, gain, "generator.", self.initializer)
        params["generator.head.weight"] = params["generator.head.weight"] * widths[-2] ** 0.5
        return params | mlp_params((self._dim, *self.critic_hidden, 1), generator, gain, "critic.", self.initializer)

    def info(self) -> dict[str, ParamInfo]:
        """Both first layers are inputs."""
        params = self.init(Generator().manual_seed(0))
        return infer_info(params, {name: "input" for name in params if name.endswith("fc1.weight")})

    def players(self, params: Params) -> dict[str, list[str]]:
        """``critic`` and ``generator``, by the prefixes of their parameters."""
        return {player: [name for name in params if name.startswith(player)] for player in ("critic", "generator")}

    def generate(self, params: Params, noise: Tensor) -> Tensor:
        """Noise [B, latent] -> points [B, d]."""
        return mlp(params, noise, ACTIVATIONS[self.activation][0], "generator.")

    def score(self, params: Params, points: Tensor) -> Tensor:
        """The critic's scores [B] of points [B, d]; high is real."""
        if self.clip:
            params = {name: self.clip * torch.tanh(p / self.clip) for name, p in params.items()}
        return mlp(params, points, ACTIVATIONS[self.activation][0], "critic.").squeeze(-1)

    def player_losses(self, params: Params, buffers: Params, batch: Batch) -> dict[str, Tensor]:
        """Losses of ``critic`` and ``generator`` on ``input`` [B, d] and as many generated points."""
        real, key = batch["input"], batch["random"]
        fake = self.generate(params, normal(key, (len(real), self.latent), 0, real.dtype))
        of_critic, of_generator = CRITERIA[self.criterion]
        fake_score = self.score(params, fake)
        critic = of_critic(self.score(params, real), fake_score)
        if self.penalty:
            slope = torch.func.grad(lambda x: self.score(params, x).sum())(real)
            critic = critic + 0.5 * self.penalty * slope.square().sum(-1).mean()
        return {"critic": critic, "generator": of_generator(fake_score)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """`energy_distance` between ``input`` [B, d] and as many generated points."""
        real = batch["input"]
        return energy_distance(
            real, self.generate(params, normal(batch["random"], (len(real), self.latent), 0, real.dtype))
        )

    def normalize(self, loss: Tensor) -> Tensor:
        """Root of loss / scale, in [0.01, 1.5]: its root is what the energy distance is a metric by; NaN counts as 1.5."""
        share = torch.nan_to_num((loss - self.floor) / self.scale, nan=WORST**2)
        return share.clamp(1e-4, WORST**2).sqrt()  # the bound below keeps the slope finite


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'| over points [N, d] and [M, d], without bias at any N, M > 1; it may be below 0.

    Zero in the mean only if the distributions are one (Szekely and Rizzo 2013, "Energy statistics").
    """
    across = _distances(x, y).mean()
    within = [_distances(z, z).sum() / max(len(z) * (len(z) - 1), 1) for z in (x, y)]
    return 2 * across - within[0] - within[1]


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return ((x[:, None] - y).square().sum(-1) + 1e-12).sqrt()  # the constant keeps the gradient finite at 0


def gan(
    name: str = "gan",
    data: str = "moons2d",
    generator_hidden: Sequence[int] = (32, 32),
    critic_hidden: Sequence[int] = (32, 32),
    activation: str = "relu",
    initializer: str = "normal",
    criterion: str = "nonsaturating",
    penalty: float = 0.0,
    clip: float = 0.0,
    latent: int = 2,
    batch_size: int = 64,
    horizon: int = 500,
    device: Any = "cpu",
) -> GAN:
    """A GAN on standardised points ``input`` [N, d]; see `GAN`.

    Normalised losses are 1 for a generator that has collapsed to the mean of the data.
    """
    splits = load(data, device)
    real = splits["valid"].tensors["input"]
    collapsed = float(energy_distance(real, real.mean(0, keepdim=True)))
    return GAN(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, scale=collapsed,
        generator_hidden=tuple(generator_hidden), critic_hidden=tuple(critic_hidden), activation=activation,
        initializer=initializer, criterion=criterion, penalty=penalty, clip=clip, latent=latent,
    )  # fmt: skip
