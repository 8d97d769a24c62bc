"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch

from metaopt.rule import ElementwiseRule
from metaopt.space import hyper, learning_rate


class RMSprop(ElementwiseRule):
    r"""Gradients divided by the root of their second moment, with L2 weight decay, as in ``torch.optim.RMSprop``.

    .. math::
        g &\leftarrow g + \lambda\, p, \qquad v \leftarrow \alpha v + (1 - \alpha)\, g^2 \\
        p &\leftarrow p - \eta\, \frac{g}{\sqrt{v} + \epsilon}

    Tieleman and Hinton, 2012 (https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf).
    """

    lr: float = learning_rate(1e-2, search=(1e-5, 1e-1))
    alpha: float = hyper(
        0.99, 0.0, 1.0, open_high=True, scale="decay", search=(0.8, 0.9999), doc="EMA decay of the second moment"
    )
    eps: float = hyper(1e-8, 0.0, scale="log", search=(1e-10, 1e-4), doc="added to the root of the second moment")
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-6, 1e-2), doc="L2 penalty")
    slots = ("square_avg",)

    def elementwise(
        self, param: Any, grad: Any, square_avg: Any, lr: Any, alpha: Any, eps: Any, weight_decay: Any
    ) -> Any:
        """See the class."""
        grad = grad + weight_decay * param
        square_avg = alpha * square_avg + (1 - alpha) * grad * grad
        return param - lr * grad / (torch.sqrt(square_avg) + eps), square_avg
