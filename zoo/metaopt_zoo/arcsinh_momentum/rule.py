"""Champion: an optimizer found by program search."""

from __future__ import annotations

from typing import Any

import torch

from metaopt.rule import ElementwiseRule
from metaopt.space import hyper, learning_rate


class Champion(ElementwiseRule):
    """Found by program search (effective) and a funnel, then simplified.

    As it was found, where ``lr`` is 1 but for a schedule and ``update`` is subtracted from ``w``::

        def train(w, g, m, v, lr):
            m = interpolate(g, m, 0.783)
            decay = square(m)
            v = interpolate(decay, v, 0.99893)
            root = sqrt(v)
            update = div(m, root)
            x1 = cbrt(lr)
            lr = mul(x1, 0.01)
            x0 = arcsinh(update)
            shrink = mul(w, 0.3)
            x0 = add(x0, shrink)
            update = mul(x0, lr)
            return update, m, v
    """

    lr: float = learning_rate(1.0, search=(0.01, 100.0))
    beta1: float = hyper(0.783, 0.0, 1.0, open_high=True, scale="decay", search=(0.5, 0.9999), doc="EMA decay")
    beta2: float = hyper(0.99893, 0.0, 1.0, open_high=True, scale="decay", search=(0.5, 0.9999), doc="EMA decay")
    weight_decay: float = hyper(0.3, 0.0, scale="log", search=(0.003, 30.0), doc="weight decay")
    slots = ("m", "v")

    def elementwise(
        self, param: Any, grad: Any, m: Any, v: Any, lr: Any, beta1: Any, beta2: Any, weight_decay: Any
    ) -> Any:
        """See the class."""
        new_m = (1 - beta1) * grad + beta1 * m
        decay = new_m * new_m
        new_v = (1 - beta2) * decay + beta2 * v
        root = torch.sqrt(torch.abs(new_v))
        update = new_m / (root + 1e-08)
        x1 = torch.sign(lr) * torch.abs(lr) ** 0.3333333333333333
        new_lr = x1 * 0.01
        x0 = torch.sign(update) * torch.log(torch.abs(update) + torch.sqrt(update * update + 1))
        shrink = param * weight_decay
        new_x0 = x0 + shrink
        new_update = new_x0 * new_lr
        return param - new_update, new_m, new_v
