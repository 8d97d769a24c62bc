"""Lion, found by symbolic program search."""

from __future__ import annotations

from typing import Any

import torch

from metaopt.rule import ElementwiseRule, HyperValues
from metaopt.space import hyper, learning_rate


class Lion(ElementwiseRule):
    r"""The sign of an interpolated momentum, with decoupled weight decay.

    .. math::
        p &\leftarrow (1 - \eta \lambda)\, p - \eta\, \mathrm{sign}(\beta_1 m + (1 - \beta_1)\, g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2)\, g

    Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms" (https://arxiv.org/abs/2302.06675), Program 1.
    """

    lr: float = learning_rate(1e-4, search=(1e-5, 1e-2))
    betas: tuple[float, float] = hyper(
        (0.9, 0.99), 0.0, 1.0, open_high=True, scale="decay", search=(0.8, 0.999), doc="EMA decays"
    )
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-4, 10.0), doc="decoupled, times lr")
    slots = ("exp_avg",)

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """The decay factor; see the class."""
        beta1, beta2 = hp["betas"]
        return {"beta1": beta1, "beta2": beta2, "lr": hp["lr"], "decay": 1 - hp["lr"] * hp["weight_decay"]}

    def elementwise(self, param: Any, grad: Any, exp_avg: Any, beta1: Any, beta2: Any, lr: Any, decay: Any) -> Any:
        """See the class."""
        direction = torch.sign(beta1 * exp_avg + (1 - beta1) * grad)
        return param * decay - lr * direction, beta2 * exp_avg + (1 - beta2) * grad
