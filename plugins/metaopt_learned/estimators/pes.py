"""Persistent evolution strategies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt_learned.estimators.episodes import Stretch
from metaopt_learned.estimators.windowed import WindowedStrategy


class PES(WindowedStrategy):
    r"""Persistent evolution strategies: unbiased for the whole episode although windows are short.

    Each pair keeps two runs and the sum :math:`\xi_i` of all perturbations since its episode began:

    .. math:: g = \frac{1}{N} \sum_i \frac{1}{2 \sigma^2 K} \sum_{t} (L^+_{i,t} - L^-_{i,t})\, \xi_{i,t}

    where :math:`\xi_{i,t}` includes this window's perturbation, and restarts with it after an episode's last step; that
    last step itself still belongs to the old episode. Unbiased for the loss smoothed by one perturbation per window.
    Vicol, Metz and Sohl-Dickstein, 2021 (https://arxiv.org/abs/2112.13835).
    """

    def _memory(self, n: int, center: Tensor) -> dict[str, Tensor]:
        return {"accumulator": center.new_zeros(n, len(center))}

    def _credits(
        self, memory: dict[str, Any], stretches: list[Stretch], eps: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        kept = memory["accumulator"].index_fill(0, stretches[0].begin.to(eps.device), 0.0)
        again = (stretches[-1].begun > stretches[0].begun).to(eps.device).unsqueeze(1)
        return [kept + eps[0], *eps[1:]], {"accumulator": torch.where(again, eps[0], kept + eps[0])}
