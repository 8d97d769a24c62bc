"""Losses of one of C classes from logits [B, C]; p is softmax(logits) at the right class y.

The margin m is the right class's logit less the largest other one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from metaopt.objective import INPUTS, Kind, Objective
from metaopt.space import hyper, option
from metaopt_objectives.stable import bounded_exp, margin


class ClassLoss(Objective):
    """A loss of logits and the right class."""

    kind: ClassVar[Kind] = "classification"
    inputs: ClassVar[tuple[str, ...]] = INPUTS["classification"]


def _log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def _log_not_p(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 - p), to full precision."""
    others = logits.masked_fill(F.one_hot(labels, logits.shape[-1]).bool(), -math.inf)
    return others.logsumexp(-1) - logits.logsumexp(-1)


class CrossEntropy(ClassLoss):
    """-(1 - smoothing) log p - smoothing (mean of log softmax): with label smoothing (Szegedy et al. 2016, arXiv:1512.00567,
    section 7)."""

    smoothing: float = hyper(0.0, 0.0, 1.0, search=(0.0, 0.3), doc="weight of the uniform distribution")

    def loss(self, logits: Tensor, labels: Tensor, smoothing: Any) -> Tensor:
        return -(1 - smoothing) * _log_p(logits, labels) - smoothing * logits.log_softmax(-1).mean(-1)


class Focal(ClassLoss):
    """-(1 - p)^gamma log p (Lin et al. 2017, arXiv:1708.02002, eq. 4)."""

    gamma: float = hyper(2.0, 0.0, 100.0, search=(0.0, 5.0), doc="how much less easy examples count")

    def loss(self, logits: Tensor, labels: Tensor, gamma: Any) -> Tensor:
        return -torch.exp(gamma * _log_not_p(logits, labels)) * _log_p(logits, labels)


class PolyLoss(ClassLoss):
    """-log p + epsilon (1 - p): Poly-1 (Leng et al. 2022, arXiv:2204.12511)."""

    epsilon: float = hyper(1.0, -1.0, 100.0, search=(-1.0, 5.0), doc="added weight of the first term of log's series")

    def loss(self, logits: Tensor, labels: Tensor, epsilon: Any) -> Tensor:
        return -_log_p(logits, labels) + epsilon * torch.exp(_log_not_p(logits, labels))


class Hinge(ClassLoss):
    """max(0, 1 - m)^power (Crammer and Singer 2001, https://jmlr.org/papers/v2/crammer01a.html)."""

    power: int = option(1, choices=(1, 2))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.relu(1 - margin(logits, labels)) ** self.power


class SummedHinge(ClassLoss):
    """sum over other classes j of max(0, 1 + logit_j - logit_y) (Weston and Watkins 1999, ESANN)."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        right = logits.gather(-1, labels[..., None])
        return torch.relu(1 + logits - right).sum(-1) - 1  # the right class's own term is 1


class SmoothHinge(ClassLoss):
    """0.5 - m where m <= 0, (1 - m)^2 / 2 up to 1, then 0 (Rennie and Srebro 2005, IJCAI workshop)."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        m = margin(logits, labels)
        return torch.where(m <= 0, 0.5 - m, 0.5 * torch.relu(1 - m).square())


class CalibratedEnsemble(ClassLoss):
    """sum of weights_k phi_k(m), phi = log(1 + e^-m), max(0, 1 - m), max(0, 1 - m)^2, e^-m.

    Each phi is convex with phi'(0) < 0, so any weights give a loss that is calibrated for two classes (Bartlett, Jordan and
    McAuliffe 2006, https://doi.org/10.1198/016214505000000907). EnsLoss (Dai 2024, arXiv:2409.00956) draws phi anew for each
    batch; this is its mean. The exponential is straight where it would overflow.
    """

    weights: tuple[float, float, float, float] = hyper(
        (0.25, 0.25, 0.25, 0.25), 0.0, 100.0, search=(0.0, 1.0), doc="logistic, hinge, squared hinge, exponential"
    )

    def loss(self, logits: Tensor, labels: Tensor, weights: Any) -> Tensor:
        m = margin(logits, labels)
        short = torch.relu(1 - m)
        logistic, hinge, squared, exponential = weights
        return hinge * short + squared * short.square() + exponential * bounded_exp(-m) - logistic * F.logsigmoid(m)


class MetricLoss(ClassLoss):
    """1 - metric of the batch's soft confusion matrix, every example's loss alike: AnyLoss (Han et al. 2024, arXiv:2405.14745).

    A class's probability q counts as 1 / (1 + exp(-sharpness (q - 1/2))). The metric is ``f1``, 2 TP / (2 TP + FP + FN), or
    ``recall``, TP / (TP + FN) (so, on average over classes, balanced accuracy), of each class that the batch has, averaged.
    """

    batch_dependent: ClassVar[bool] = True

    metric: str = option("f1", choices=("f1", "recall"))
    sharpness: float = hyper(
        73.0, 0.0, 1000.0, scale="log", open_low=True, search=(1.0, 100.0), doc="of the soft counts"
    )

    def loss(self, logits: Tensor, labels: Tensor, sharpness: Any) -> Tensor:
        right = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        counted = torch.sigmoid(sharpness * (logits.softmax(-1) - 0.5))
        hits, present = (counted * right).sum(0), right.sum(0)
        of_class = 2 * hits / (counted.sum(0) + present) if self.metric == "f1" else hits / present.clamp(min=1)
        mean = (of_class * (present > 0)).sum() / (present > 0).sum()
        return (1 - mean).expand(len(labels))
