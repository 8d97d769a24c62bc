"""Preference losses that language models found (Lu et al. 2024, DiscoPOP, arXiv:2406.08414).

In the formulas z = beta rho (see `metaopt_objectives.preference`), DPO = -log sigmoid(z), and SLiC = max(0, 1 - z). Those with
means and variances take them over the batch, and differentiate through them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from metaopt.space import hyper
from metaopt_objectives.preference import MarginLoss, PreferenceLoss, beta
from metaopt_objectives.stable import bounded_exp, sample_variance, standard_deviation


def tau() -> Any:
    """Declare ``tau``."""
    return hyper(0.05, 0.0, 100.0, scale="log", open_low=True, search=(0.01, 1.0), doc="sharpness of the switch")


class LogRatioModulated(MarginLoss):
    """(1 - s) DPO + s exp(-z), s = sigmoid(z / tau): LRML, which is DiscoPOP.

    With beta = tau = 0.05 not convex: a minimum at rho = -2.37, a maximum at 1.44.
    """

    beta: float = beta(0.05)
    tau: float = tau()

    def loss(self, rho: Any, beta: Any, tau: Any) -> Any:
        z = beta * rho
        # s exp(-z) as one exponential: for very negative z it is 0 times infinity otherwise
        return bounded_exp(F.logsigmoid(z / tau) - z) - torch.sigmoid(-z / tau) * F.logsigmoid(z)


class PADLL(MarginLoss):
    """0.9 (1 - 0.5 [rho < 0]) DPO: performance-adaptive decay."""

    beta: float = beta(0.05)

    def loss(self, rho: Any, beta: Any) -> Any:
        dpo = -F.logsigmoid(beta * rho)
        return torch.where(rho < 0, 0.45 * dpo, 0.9 * dpo)  # of two numbers torch would make a float32


class CELL(MarginLoss):
    """0.5 exp(-z) + 0.5 DPO: combined exponential and logistic; the exponential is straight where it would overflow."""

    beta: float = beta(0.05)

    def loss(self, rho: Any, beta: Any) -> Any:
        z = beta * rho
        return 0.5 * bounded_exp(-z) - 0.5 * F.logsigmoid(z)


class AQL(MarginLoss):
    """q DPO + (1 - q) SLiC, q = sigmoid(a - z / tau), a = 0.5 + 0.01 (sigmoid(mean(z / tau)) - 0.5): adaptive quantile."""

    batch_dependent: ClassVar[bool] = True

    beta: float = beta(0.05)
    tau: float = tau()

    def loss(self, rho: Any, beta: Any, tau: Any) -> Any:
        z = beta * rho
        a = 0.5 + 0.01 * (torch.sigmoid((z / tau).mean()) - 0.5)
        q = torch.sigmoid(a - z / tau)
        return (1 - q) * torch.relu(1 - z) - q * F.logsigmoid(z)


class AQFL(MarginLoss):
    """b DPO + (1 - b) SLiC, b = sigmoid(0.1 |z / tau - a|), a = c + 0.05 (sigmoid(mean(z / tau)) - c),
    c = std(z / tau) mean(sigmoid(-z / tau)): adaptive quantile with feedback.
    """

    batch_dependent: ClassVar[bool] = True

    beta: float = beta(0.05)
    tau: float = tau()

    def loss(self, rho: Any, beta: Any, tau: Any) -> Any:
        z = beta * rho
        x = z / tau
        c = standard_deviation(x) * torch.sigmoid(-x).mean()
        a = c + 0.05 * (torch.sigmoid(x.mean()) - c)
        b = torch.sigmoid(0.1 * torch.abs(x - a))
        return (1 - b) * torch.relu(1 - z) - b * F.logsigmoid(z)


class DBAQL(MarginLoss):
    """c (-log sigmoid(z / 0.9)) + (1 - c) exp(-0.9 z), c = sigmoid(var(z / tau)): dynamic blending.

    The authors' plots have exp(+0.9 z); this is what their training code computes.
    """

    batch_dependent: ClassVar[bool] = True

    beta: float = beta(0.05)
    tau: float = tau()

    def loss(self, rho: Any, beta: Any, tau: Any) -> Any:
        z = beta * rho
        variance = sample_variance(z / tau)
        # (1 - c) exp(-0.9 z) as one exponential: it may be 0 times infinity otherwise
        return bounded_exp(F.logsigmoid(-variance) - 0.9 * z) - torch.sigmoid(variance) * F.logsigmoid(z / 0.9)


class PFL(PreferenceLoss):
    """DPO / 2 where pi_w > pi_l, else 2 SLiC: policy-focused. The authors' plots ask for rho > 0 instead."""

    beta: float = beta(0.05)

    def loss(self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, beta: Any) -> Any:
        z = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
        return torch.where(chosen > rejected, -0.5 * F.logsigmoid(z), 2 * torch.relu(1 - z))
