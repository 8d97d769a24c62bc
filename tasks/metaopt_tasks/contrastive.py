"""Contrastive and other joint-embedding learning: two augmented views of an example should be embedded alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.random import normal, uniform
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.conv import conv
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, hidden_weight, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

CRITERIA = ("infonce", "vicreg", "barlow")
_DEVIATION_FLOOR = 1e-4  # VICReg's, inside the root


@dataclass(eq=False)
class Contrastive(ScaledTask):
    """An encoder of ``input`` [B, ...] trained and judged on two keyed views of each example; labels are not used.

    A view is the input moved in a circle by up to ``shift`` places in every spatial dimension, plus Gaussian noise,
    with a random share of its numbers set to 0.

    Attributes:
        channels: of convolutions with stride 2, for images and series; averaged over positions at the end. May be empty.
        hidden: widths of the MLP after them.
        embedding: numbers per embedding, at least 2.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: of the hidden weights; a name in `metaopt_tasks.layers.INITIALIZERS`.
        criterion: `info_nce`, `vicreg` or `barlow_twins` of the embeddings, as ``infonce``, ``vicreg`` or ``barlow``.
        temperature: of ``infonce``.
        noise: standard deviation.
        mask: share of numbers set to 0, below 1.
        shift: largest circular shift; 0 for inputs without spatial dimensions.
    """

    stochastic: ClassVar[bool] = True

    channels: tuple[int, ...] = ()
    hidden: tuple[int, ...] = (64,)
    embedding: int = 16
    activation: str = "relu"
    initializer: str = "normal"
    criterion: str = "infonce"
    temperature: float = 0.2
    noise: float = 0.3
    mask: float = 0.2
    shift: int = 0

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("criterion", self.criterion, CRITERIA)
        self._shape = self.train.tensors["input"].shape[1:]
        if (self.channels or self.shift) and len(self._shape) < 2:
            raise ValueError(
                f"channels and shift need images or series, got inputs of shape {tuple(self._shape)}; use 0"
            )
        if self.embedding < 2:
            raise ValueError(f"embedding must be at least 2, got {self.embedding}; two examples need room to differ")
        if not 0 <= self.mask < 1:
            raise ValueError(f"mask must be in [0, 1), got {self.mask}; it is the share of numbers that a view loses")

    def init(self, generator: Generator) -> Params:
        """Hidden weights by ``initializer``, a small head, zero biases."""
        gain = ACTIVATIONS[self.activation][1]
        params: Params = {}
        depth = self._shape[0]
        for i, new in enumerate(self.channels, start=1):
            kernel = (3,) * (len(self._shape) - 1)
            params[f"conv{i}.weight"] = hidden_weight((new, depth, *kernel), generator, gain, self.initializer)
            params[f"conv{i}.bias"] = torch.zeros(new)
            depth = new
        width = depth if self.channels else math.prod(self._shape)
        sizes = (width, *self.hidden, self.embedding)
        return params | mlp_params(sizes, generator, gain, initializer=self.initializer)

    def info(self) -> dict[str, ParamInfo]:
        """The first layer is the input."""
        first = "conv1.weight" if self.channels else "fc1.weight"
        return infer_info(self.init(Generator().manual_seed(0)), {first: "input"})

    def embed(self, params: Params, x: Tensor) -> Tensor:
        """Inputs [B, ...] -> embeddings [B, embedding]."""
        act = ACTIVATIONS[self.activation][0]
        for i in range(1, len(self.channels) + 1):
            x = act(conv(params, f"conv{i}", x, stride=2))
        return mlp(params, x.flatten(2).mean(2) if self.channels else x.flatten(1), act)

    def view(self, x: Tensor, key: Tensor, stream: int) -> Tensor:
        """A random view of each of ``x`` [B, ...]; views of different ``stream`` differ."""
        for dim in range(2, x.dim()) if self.shift else ():
            size = x.shape[dim]
            step = ((2 * self.shift + 1) * uniform(key, (len(x),), 8 * stream + dim)).long() - self.shift
            source = (torch.arange(size, device=x.device) - step[:, None]) % size
            where = source.reshape(len(x), *[size if d == dim else 1 for d in range(1, x.dim())])
            x = x.gather(dim, where.expand(x.shape))
        x = x + self.noise * normal(key, x.shape, 8 * stream, x.dtype)
        return x * (uniform(key, x.shape, 8 * stream + 1) >= self.mask)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The criterion between the embeddings of two views of ``input``."""
        views = torch.cat([self.view(batch["input"], batch["random"], stream) for stream in (0, 1)])
        one, two = self.embed(params, views).chunk(2)
        if self.criterion == "infonce":
            return info_nce(one, two, self.temperature, negatives=self.batch_size - 1)
        return vicreg(one, two) if self.criterion == "vicreg" else barlow_twins(one, two)


def info_nce(one: Tensor, two: Tensor, temperature: float, negatives: int) -> Tensor:
    """Mean cross-entropy, in both directions, of finding an example's other view among ``negatives`` + 1 candidates.

    By cosine similarity / temperature (van den Oord et al. 2018, arXiv:1807.03748; SimCLR, arXiv:2002.05709). The
    candidates of row i are rows i ... i + negatives of the other view, in a circle: at B = negatives + 1 that is the
    whole batch, and in a larger batch the loss means the same. A smaller batch is scaled up.

    Args:
        one: embeddings [B, d] of the first views.
        two: of the second views.
        temperature: above 0.
        negatives: candidates besides the right one.
    """
    size = len(one)
    scores = F.normalize(one, dim=-1) @ F.normalize(two, dim=-1).T / temperature
    row = torch.arange(size, device=one.device)
    far = (row - row[:, None]) % size > negatives
    missing = math.log((negatives + 1) / min(size, negatives + 1))
    right = scores.diagonal().mean()
    both = [s.masked_fill(far, -math.inf).logsumexp(1).mean() for s in (scores, scores.T)]
    return 0.5 * (both[0] + both[1]) - right + missing


def vicreg(one: Tensor, two: Tensor) -> Tensor:
    """Invariance, variance and covariance of embeddings [B, d], weighted 25, 25 and 1 (Bardes et al. 2022, arXiv:2105.04906).

    Variances and covariances are those of the batch, so the loss changes a little with B.
    """
    loss = 25 * F.mse_loss(one, two)
    for z in (one, two):
        z = z - z.mean(0)
        covariance = z.T @ z / max(len(z) - 1, 1)
        variance = covariance.diagonal()
        loss = loss + 25 * F.relu(1 - (variance + _DEVIATION_FLOOR).sqrt()).mean()
        loss = loss + (covariance.square().sum() - variance.square().sum()) / z.shape[1]
    return loss


def barlow_twins(one: Tensor, two: Tensor) -> Tensor:
    """Squared distance of the views' correlations [d, d] from 1 on the diagonal and from 0 elsewhere; the mean of each.

    Zbontar et al. 2021, arXiv:2103.03230, with weight 1 / (d - 1) for their 0.005 (at d = 8192): coordinates that are
    all the same then cost as much as views that have nothing in common. Correlations are those of the batch, so the
    loss changes a little with B.
    """
    degrees = max(len(one) - 1, 1)  # a last chunk of a split may hold a single example
    one, two = (z - z.mean(0) for z in (one, two))
    one, two = (z / (z.square().sum(0) / degrees + 1e-5).sqrt() for z in (one, two))
    correlation = one.T @ two / degrees
    diagonal = correlation.diagonal()
    others = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().mean() + others / (len(diagonal) * (len(diagonal) - 1))


def contrastive(
    name: str = "contrastive",
    data: str = "digits",
    channels: Sequence[int] = (),
    hidden: Sequence[int] = (64,),
    embedding: int = 16,
    activation: str = "relu",
    initializer: str = "normal",
    criterion: str = "infonce",
    temperature: float = 0.2,
    noise: float = 0.3,
    mask: float = 0.2,
    shift: int = 0,
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> Contrastive:
    """Joint-embedding learning on a source with ``input`` [N, ...]; see `Contrastive`.

    Normalised losses are 1 for an embedding that does not depend on the input.
    """
    splits = load(data, device)
    require_choice("criterion", criterion, CRITERIA)
    collapsed = {
        "infonce": math.log(batch_size),
        "vicreg": 50 * (1 - math.sqrt(_DEVIATION_FLOOR)),
        "barlow": 1.0,
    }[criterion]
    return Contrastive(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, scale=collapsed,
        channels=tuple(channels), hidden=tuple(hidden), embedding=embedding, activation=activation,
        initializer=initializer, criterion=criterion, temperature=temperature, noise=noise, mask=mask, shift=shift,
    )  # fmt: skip
