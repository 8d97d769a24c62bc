"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

from metaopt.program import where
from metaopt.rule import ElementwiseRule, HyperValues
from metaopt.space import hyper, learning_rate, option


class SGD(ElementwiseRule):
    r"""SGD with (Nesterov) momentum and L2 weight decay, as in ``torch.optim.SGD``.

    .. math::
        g &\leftarrow g + \lambda\, p \\
        m &\leftarrow \mu\, m + (1 - d)\, g \qquad (m = g \text{ at the first step}) \\
        p &\leftarrow p - \eta\, (g + \mu\, m \text{ if nesterov, else } m)

    The buffer exists with momentum 0 as well, so that momentum may vary between copies and be differentiated.
    Sutskever et al., 2013 (https://proceedings.mlr.press/v28/sutskever13.html).
    """

    lr: float = learning_rate(1e-3, search=(1e-3, 10.0))
    momentum: float = hyper(0.0, 0.0, 1.0, open_high=True, scale="decay", search=(0.5, 0.99), doc="EMA-like momentum")
    dampening: float = hyper(0.0, 0.0, 1.0, doc="scales new gradients down by 1 - dampening, from the second step on")
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-6, 1e-2), doc="L2 penalty")
    nesterov: bool = option(False, choices=(False, True), doc="look ahead along the momentum")
    slots = ("momentum_buffer",)

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """The first gradient enters whole; so does every gradient when there is no momentum."""
        gain = where(t > 1, where(hp["momentum"] > 0, 1 - hp["dampening"], 1.0), 1.0)
        return {"lr": hp["lr"], "momentum": hp["momentum"], "gain": gain, "weight_decay": hp["weight_decay"]}

    def elementwise(
        self, param: Any, grad: Any, momentum_buffer: Any, lr: Any, momentum: Any, gain: Any, weight_decay: Any
    ) -> Any:
        """See the class."""
        grad = grad + weight_decay * param
        momentum_buffer = momentum * momentum_buffer + gain * grad
        direction = grad + momentum * momentum_buffer if self.nesterov else momentum_buffer
        return param - lr * direction, momentum_buffer
