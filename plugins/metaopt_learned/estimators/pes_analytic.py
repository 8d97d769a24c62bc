"""PES with the newest window differentiated instead of perturbed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt.learned import Theta, to_vector
from metaopt.meta.inner import InnerProblem
from metaopt.space import option
from metaopt_learned.estimators.episodes import Stretch
from metaopt_learned.estimators.pes import PES
from metaopt_learned.estimators.reverse import unroll_gradient


class PESAnalytic(PES):
    r"""PES whose window of truncated backpropagation is exact: unbiased, and of lower variance per pair.

    Unrolled over windows, the loss of window w is a function :math:`L_w(\theta_1, \ldots, \theta_w)` of one theta per
    window, and its gradient the sum of the partial ones. That of the newest window is what truncated backpropagation gives
    from the states :math:`s^\pm` that earlier perturbations led to; only the others are estimated, as PES does:

    .. math:: g = \frac{1}{N} \sum_i \left[ \frac{1}{2} \left(\nabla_\theta L_w(\theta; s_i^+) + \nabla_\theta
        L_w(\theta; s_i^-)\right) + \frac{L_w(\theta; s_i^+) - L_w(\theta; s_i^-)}{2 \sigma^2}\, \xi_i^{(<w)} \right]

    where :math:`\xi_i^{(<w)} = \sum_{\tau < w} \epsilon_{i,\tau}`. The differentiated runs are at theta itself, so the
    newest perturbation adds no noise at all; another pair of runs, at theta +- eps, carries the states on. Unbiased for
    the loss smoothed in all windows but its own. After "PES + analytic" of Vicol, Metz and Sohl-Dickstein, 2021
    (https://arxiv.org/abs/2112.13835).
    """

    segment: int = option(1, low=1, doc="inner steps whose graph is kept at a time; 1 needs the least memory")

    _sweeps: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shaping != "none":
            raise ValueError(
                f"shaping must be 'none' where gradients are added to differences of losses, got {self.shaping!r}"
            )
        if self.seed_replay:
            raise ValueError(
                "seed_replay must be False where runs are differentiated: seeds do not tell their gradients"
            )

    def _run(
        self, inner: InnerProblem, theta: Theta, eps: Tensor, state: dict[str, Any], stretches: list[Stretch]
    ) -> tuple[Tensor, dict[str, Any], Tensor]:
        perturbed, carried, _ = super()._run(inner, theta, eps, state, stretches)
        pieces = [piece for stretch in stretches for piece in stretch.pieces(self.segment)]
        thetas = to_vector(theta).expand(eps.shape[1], self._signs, -1)
        losses, gradients, _ = unroll_gradient(
            inner, thetas, theta, state, pieces, lambda found: torch.full_like(found, 1 / self.window)
        )
        sound = torch.isfinite(perturbed) & torch.isfinite(gradients).all(2, keepdim=True).to(perturbed.device)
        return torch.where(sound, losses, torch.nan), carried, gradients.mean(1)

    def _credits(
        self, memory: dict[str, Any], stretches: list[Stretch], eps: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        credits, memory = super()._credits(memory, stretches, eps)
        return [credits[0] - eps[0], *torch.zeros_like(eps[1:])], memory
