"""Weights of examples from their losses; a training problem multiplies by them as constants, and averages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt.objective import INPUTS, Kind, Objective
from metaopt.space import hyper


class Reweighting(Objective):
    """From losses [B] to weights [B]."""

    kind: ClassVar[Kind] = "reweighting"
    inputs: ClassVar[tuple[str, ...]] = INPUTS["reweighting"]


class Tilted(Reweighting):
    """B softmax(tilt losses): tilted empirical risk (Li et al. 2021, arXiv:2007.01162).

    Above 0 the hard examples count more, up to the worst alone; below 0 less, so that outliers do not.
    """

    batch_dependent: ClassVar[bool] = True

    tilt: float = hyper(1.0, -100.0, 100.0, search=(-5.0, 5.0), doc="0 is uniform")

    def loss(self, losses: Tensor, tilt: Any) -> Tensor:
        return len(losses) * torch.softmax(tilt * losses, 0)


class SelfPaced(Reweighting):
    """max(0, 1 - loss / limit): linear self-paced learning (Jiang et al. 2014, https://doi.org/10.1145/2647868.2654918;
    with weights 0 and 1: Kumar, Packer and Koller 2010)."""

    limit: float = hyper(
        1.0, 0.0, 1e6, scale="log", open_low=True, search=(0.1, 100.0), doc="examples beyond it count nothing"
    )

    def loss(self, losses: Any, limit: Any) -> Any:
        return torch.relu(1 - losses / limit)


class FocalWeights(Reweighting):
    """(1 - exp(-loss))^gamma: the focal loss's factor (Lin et al. 2017, arXiv:1708.02002, eq. 4), for any log-loss."""

    gamma: float = hyper(2.0, 0.0, 100.0, search=(0.0, 5.0), doc="how much less easy examples count")

    def loss(self, losses: Tensor, gamma: Any) -> Tensor:
        return (-torch.expm1(-losses.clamp(min=0))) ** gamma


class _Share(Reweighting):
    """1 / share for the ``share`` of the batch, rounded up, that comes first, else 0; equal losses count alike."""

    batch_dependent: ClassVar[bool] = True

    share: float = hyper(0.5, 0.0, 1.0, open_low=True, search=(0.1, 1.0), doc="of the batch that counts")
    hardest: ClassVar[bool]

    def loss(self, losses: Tensor, share: Any) -> Tensor:
        count = len(losses)
        order = losses.sort(descending=self.hardest).values
        last = order.gather(0, torch.as_tensor(share * count).ceil().long().view(1) - 1)
        chosen = (losses >= last if self.hardest else losses <= last).to(losses.dtype)
        return chosen * (count / chosen.sum())


class HardestShare(_Share):
    """B / n for the n hardest examples, n = ceil(share B), else 0: average top-k (Fan et al. 2017, arXiv:1705.08826).

    Examples as hard as the n-th count too.
    """

    hardest: ClassVar[bool] = True


class EasiestShare(_Share):
    """B / n for the n easiest examples, n = ceil(share B), else 0: small-loss selection (Han et al. 2018, arXiv:1804.06872).

    Examples as easy as the n-th count too.
    """

    hardest: ClassVar[bool] = False
