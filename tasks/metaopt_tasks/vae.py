"""Variational autoencoders of images, their noise drawn from the step's key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from metaopt.random import normal
from metaopt.rule import Params
from metaopt.task import Batch
from metaopt_tasks.autoencoder import Autoencoder, make_coder
from metaopt_tasks.data.load import load


@dataclass(eq=False)
class VAE(Autoencoder):
    """Minus the evidence lower bound of Kingma and Welling 2014 (arXiv:1312.6114), in nats per pixel.

    The code is Gaussian with a diagonal covariance, its prior standard normal. Pixels given the code are Gaussian of a
    fixed standard deviation (criterion ``mse``) or Bernoulli (``bce``, of values in [0, 1]). Normalised, 0 is a perfect
    reconstruction that costs no bits (a lower bound that none reaches), 1 is a decoder that gives zeros whatever the code.

    Attributes:
        beta: factor of the Kullback-Leibler divergence (Higgins et al. 2017); 1 gives the bound.
        sigma: standard deviation of Gaussian pixels.
    """

    stochastic: ClassVar[bool] = True

    beta: float = 1.0
    sigma: float = 0.5

    def __post_init__(self) -> None:
        if self.beta < 0 or self.sigma <= 0:
            raise ValueError(f"beta must be at least 0 and sigma above 0, got {self.beta} and {self.sigma}")
        super().__post_init__()

    def _floor_and_scale(self, targets: Tensor) -> tuple[float, float]:
        floor, scale = super()._floor_and_scale(targets)
        if self.criterion == "mse":
            return self._log_normalizer(), scale / (2 * self.sigma**2)
        return floor, scale

    def _log_normalizer(self) -> float:
        return math.log(self.sigma) + 0.5 * math.log(2 * math.pi)

    def reconstruction(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Minus the log-likelihood of a pixel, mean over pixels."""
        distance = super().reconstruction(outputs, inputs)
        return distance / (2 * self.sigma**2) + self._log_normalizer() if self.criterion == "mse" else distance

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean over ``input`` [B, ...] of the bound, with one code per example drawn from ``random``."""
        inputs = batch["input"]
        mean, log_variance = self.coder.encode(params, inputs).chunk(2, -1)
        noise = normal(batch["random"], mean.shape, dtype=mean.dtype)
        outputs = self.coder.decode(params, mean + (log_variance / 2).exp() * noise)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return self.reconstruction(outputs, inputs) + self.beta * divergence / math.prod(self.coder.shape)


def vae(
    name: str = "vae",
    data: str = "digits",
    coder: str = "mlp",
    widths: Sequence[int] = (32,),
    code: int = 4,
    activation: str = "relu",
    criterion: str = "bce",
    beta: float = 1.0,
    sigma: float = 0.5,
    batch_size: int = 64,
    horizon: int = 500,
    device: Any = "cpu",
) -> VAE:
    """A variational autoencoder of any source with ``input``; ``coder`` is ``mlp`` or ``conv``; see `VAE`."""
    splits = load(data, device)
    return VAE(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon,
        coder=make_coder(coder, splits, widths, code, activation, moments=2), criterion=criterion, beta=beta, sigma=sigma,
    )  # fmt: skip
