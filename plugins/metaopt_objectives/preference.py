"""Losses of a pair of answers, of which one was preferred.

In the formulas w is the chosen answer and l the rejected one, pi the policy's log-probability and ref its reference's,

    rho_w = pi_w - ref_w,    rho_l = pi_l - ref_l,    rho = rho_w - rho_l,

and |w|, |l| are lengths in tokens. ``beta`` is what the KL divergence from the reference costs: the smaller, the further the
policy goes. The logistic function is torch's logsigmoid: its softplus drops e^-x beyond 20.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from metaopt.objective import LOG_PROBABILITIES, Kind, Objective
from metaopt.space import hyper, option
from metaopt_objectives.stable import bounded_exp, log_odds

CHOSEN, REJECTED = LOG_PROBABILITIES[:2]
LENGTHS = ("chosen_lengths", "rejected_lengths")
SCORES = ("chosen_scores", "rejected_scores")


def beta(default: float = 0.1) -> Any:
    """Declare ``beta``."""
    return hyper(
        default, 0.0, 100.0, scale="log", open_low=True, search=(0.01, 1.0), doc="weight of staying near the reference"
    )


class PreferenceLoss(Objective):
    """A loss of pairs; reads the four log-probabilities unless it says otherwise."""

    kind: ClassVar[Kind] = "preference"
    inputs: ClassVar[tuple[str, ...]] = LOG_PROBABILITIES


class MarginLoss(PreferenceLoss):
    """A loss that is a function of rho alone."""

    inputs: ClassVar[tuple[str, ...]] = ("rho",)


class DPO(MarginLoss):
    """-log sigmoid(beta rho): direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""

    beta: float = beta()

    def loss(self, rho: Any, beta: Any) -> Any:
        return -F.logsigmoid(beta * rho)


class IPO(MarginLoss):
    """(rho - 1 / (2 beta))^2: identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""

    beta: float = beta()

    def loss(self, rho: Any, beta: Any) -> Any:
        return torch.square(rho - 0.5 / beta)


class SLiC(MarginLoss):
    """max(0, 1 - beta rho): the hinge loss (Zhao et al. 2023, arXiv:2305.10425; on log-ratios: Liu et al. 2023, 2309.06657)."""

    beta: float = beta()

    def loss(self, rho: Any, beta: Any) -> Any:
        return torch.relu(1 - beta * rho)


class Exponential(MarginLoss):
    """exp(-beta rho), AdaBoost's loss (Tang et al. 2024, arXiv:2402.05749); straight where it would overflow."""

    beta: float = beta()

    def loss(self, rho: Any, beta: Any) -> Any:
        return bounded_exp(-beta * rho)


class KTOPair(PreferenceLoss, eq=False):
    """Half of (1 - sigmoid(beta (rho_w - k_l))) + (1 - sigmoid(beta (k_w - rho_l))): Kahneman-Tversky optimisation of pairs
    (Ethayarajh et al. 2024, arXiv:2402.01306).

    k_w = max(0, mean of rho_w over the batch), likewise k_l: estimates of KL(pi || ref), constants to the gradient.
    """

    batch_dependent: ClassVar[bool] = True

    beta: float = beta()

    def loss(self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, beta: Any) -> Any:
        rho_w, rho_l = chosen - reference_chosen, rejected - reference_rejected
        k_w, k_l = (torch.relu(rho.mean()).detach() for rho in (rho_w, rho_l))
        return 0.5 * (torch.sigmoid(beta * (k_l - rho_w)) + torch.sigmoid(beta * (rho_l - k_w)))


class ORPO(PreferenceLoss):
    """-pi_w / |w| - lam log sigmoid(o_w - o_l), o = log-odds of exp(pi / length) (Hong et al. 2024, arXiv:2403.07691, eq. 6).

    Needs no reference. Probabilities per token count as at most 1 - 1e-6.
    """

    inputs: ClassVar[tuple[str, ...]] = (CHOSEN, REJECTED, *LENGTHS)

    lam: float = hyper(0.1, 0.0, 100.0, scale="log", search=(0.01, 1.0), doc="weight of the odds ratio")

    def loss(self, chosen: Any, rejected: Any, chosen_lengths: Any, rejected_lengths: Any, lam: Any) -> Any:
        of_chosen = chosen / chosen_lengths
        return -of_chosen - lam * F.logsigmoid(log_odds(of_chosen) - log_odds(rejected / rejected_lengths))


class BCO(PreferenceLoss):
    """-log sigmoid(r_w - d) - log sigmoid(d - r_l), r = beta (pi - ref): binary classifier optimisation (Jung et al. 2024,
    arXiv:2404.04656).

    d = (mean r_w + mean r_l) / 2, a constant to the gradient: of the batch, where the paper has a running mean.
    """

    batch_dependent: ClassVar[bool] = True

    beta: float = beta()

    def loss(self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, beta: Any) -> Any:
        r_w, r_l = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
        d = 0.5 * (r_w.mean() + r_l.mean()).detach()
        return -F.logsigmoid(r_w - d) - F.logsigmoid(d - r_l)


class ODPO(PreferenceLoss):
    """-log sigmoid(beta rho - alpha log(s_w - s_l)): DPO with an offset (Amini et al. 2024, arXiv:2402.10571).

    s are scores of the answers, as of a reward model; gaps below 1e-6 count as that.
    """

    inputs: ClassVar[tuple[str, ...]] = (*LOG_PROBABILITIES, *SCORES)

    beta: float = beta()
    alpha: float = hyper(1.0, 0.0, 100.0, search=(0.0, 2.0), doc="weight of the offset")

    def loss(
        self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any,
        chosen_scores: Any, rejected_scores: Any, beta: Any, alpha: Any,
    ) -> Any:  # fmt: skip
        rho = (chosen - reference_chosen) - (rejected - reference_rejected)
        offset = alpha * torch.log(torch.clamp(chosen_scores - rejected_scores, min=1e-6))
        return -F.logsigmoid(beta * rho - offset)


class DPOShift(PreferenceLoss):
    """-log sigmoid(beta (rho_w - shift rho_l)), which lets the chosen answer gain (Yang et al. 2025, arXiv:2502.07599)."""

    beta: float = beta()
    shift: float = hyper(0.75, 0.0, 1.0, search=(0.5, 1.0), doc="weight of the rejected answer; 1 is DPO")

    def loss(
        self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, beta: Any, shift: Any
    ) -> Any:
        return -F.logsigmoid(beta * ((chosen - reference_chosen) - shift * (rejected - reference_rejected)))


class LengthNormalizedDPO(PreferenceLoss):
    """-log sigmoid(beta (rho_w / |w| - rho_l / |l|)) (Ahrabian et al. 2024, arXiv:2407.15229)."""

    inputs: ClassVar[tuple[str, ...]] = (*LOG_PROBABILITIES, *LENGTHS)

    beta: float = beta(1.0)

    def loss(
        self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any,
        chosen_lengths: Any, rejected_lengths: Any, beta: Any,
    ) -> Any:  # fmt: skip
        rho_w, rho_l = chosen - reference_chosen, rejected - reference_rejected
        return -F.logsigmoid(beta * (rho_w / chosen_lengths - rho_l / rejected_lengths))


class RPO(PreferenceLoss):
    """-log sigmoid(beta rho) - eta pi_w: regularised preference optimisation (Liu et al. 2024, arXiv:2405.16436), whose
    baseline are the chosen answers.

    Not relative preference optimisation, nor the length-normalised term that some libraries call ``rpo_alpha``.
    """

    beta: float = beta()
    eta: float = hyper(0.005, 0.0, 100.0, scale="log", search=(1e-4, 1.0), doc="weight of imitation")

    def loss(
        self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, beta: Any, eta: Any
    ) -> Any:
        rho = (chosen - reference_chosen) - (rejected - reference_rejected)
        return -F.logsigmoid(beta * rho) - eta * chosen


class PMPO(PreferenceLoss):
    """-alpha pi_w + (1 - alpha) pi_l + beta k: preferences as inference (Abdolmaleki et al. 2024, arXiv:2410.04166).

    k = -(rho_w + rho_l) / 2 estimates KL(ref || pi) from the two answers as if the reference had drawn them. Bounded below
    only where alpha + beta / 2 >= 1 or the policy has few answers.
    """

    alpha: float = hyper(0.5, 0.0, 1.0, search=(0.1, 0.9), doc="weight of accepted answers")
    beta: float = beta(1.0)

    def loss(
        self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, alpha: Any, beta: Any
    ) -> Any:
        k = -0.5 * ((chosen - reference_chosen) + (rejected - reference_rejected))
        return -alpha * chosen + (1 - alpha) * rejected + beta * k


class FDivergenceDPO(PreferenceLoss):
    """-log sigmoid(beta f'(u_w) - beta f'(u_l)), u = exp(pi - ref): DPO with another divergence (Wang et al. 2023,
    arXiv:2309.16240).

    With r = log u, f'(u) is: ``reverse_kl`` r + 1 (so DPO), ``js`` log(2u / (1 + u)), ``alpha`` (1 - exp(-alpha r)) / alpha,
    ``forward_kl`` -exp(-r). Exponentials are straight where they would overflow.
    """

    divergence: str = option("js", choices=("reverse_kl", "js", "alpha", "forward_kl"))
    beta: float = beta()
    alpha: float = hyper(0.5, 0.0, 1.0, open_low=True, search=(0.1, 0.9), doc="of the alpha-divergence")

    def loss(
        self, chosen: Any, rejected: Any, reference_chosen: Any, reference_rejected: Any, beta: Any, alpha: Any
    ) -> Any:
        slopes = self._slope(chosen - reference_chosen, alpha), self._slope(rejected - reference_rejected, alpha)
        return -F.logsigmoid(beta * (slopes[0] - slopes[1]))

    def _slope(self, r: Any, alpha: Any) -> Any:
        if self.divergence == "reverse_kl":
            return r + 1
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(r)
        if self.divergence == "alpha":
            return (1 - bounded_exp(-alpha * r)) / alpha
        return -bounded_exp(-r)


class SimPO(PreferenceLoss):
    """-log sigmoid(beta pi_w / |w| - beta pi_l / |l| - gamma), no reference (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""

    inputs: ClassVar[tuple[str, ...]] = (CHOSEN, REJECTED, *LENGTHS)

    beta: float = beta(2.0)
    gamma: float = hyper(1.0, 0.0, 100.0, search=(0.0, 3.0), doc="margin that is aimed at")

    def loss(
        self, chosen: Any, rejected: Any, chosen_lengths: Any, rejected_lengths: Any, beta: Any, gamma: Any
    ) -> Any:
        return -F.logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)


class CPO(PreferenceLoss):
    """-log sigmoid(beta (pi_w - pi_l)) - lam pi_w: contrastive, without a reference (Xu et al. 2024, arXiv:2401.08417)."""

    inputs: ClassVar[tuple[str, ...]] = (CHOSEN, REJECTED)

    beta: float = beta()
    lam: float = hyper(1.0, 0.0, 100.0, scale="log", search=(0.01, 1.0), doc="weight of imitation")

    def loss(self, chosen: Any, rejected: Any, beta: Any, lam: Any) -> Any:
        return -F.logsigmoid(beta * (chosen - rejected)) - lam * chosen
