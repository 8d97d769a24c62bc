"""A sign-momentum rule with a soft sign."""

from typing import Any

import torch

from metaopt import ElementwiseRule, hyper, learning_rate


class SoftSign(ElementwiseRule):
    r"""Momentum whose step is bounded by lr, and goes to zero with the momentum.

    .. math::
        m \leftarrow \beta m + (1 - \beta)\, g, \qquad p \leftarrow p - \eta\, \frac{m}{|m| + \delta}
    """

    lr: float = learning_rate(1e-2, search=(1e-4, 1e-1))
    beta: float = hyper(0.9, 0.0, 1.0, open_high=True, scale="decay", search=(0.5, 0.99), doc="EMA decay")
    delta: float = hyper(1e-3, 0.0, open_low=True, scale="log", search=(1e-6, 1.0), doc="where the sign softens")
    slots = ("momentum",)

    def elementwise(self, param: Any, grad: Any, momentum: Any, lr: Any, beta: Any, delta: Any) -> Any:
        """See the class."""
        momentum = beta * momentum + (1 - beta) * grad
        return param - lr * momentum / (torch.abs(momentum) + delta), momentum
