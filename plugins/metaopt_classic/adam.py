"""Adam and its nearest kin."""

from __future__ import annotations

from typing import Any

import torch

from metaopt.rule import ElementwiseRule, HyperValues
from metaopt.space import hyper, learning_rate, option

_BETAS: dict[str, Any] = {
    "low": 0.0,
    "high": 1.0,
    "open_high": True,
    "scale": "decay",
    "search": (0.8, 0.9999),
    "doc": "EMA decays",
}
_EPS: dict[str, Any] = {
    "low": 0.0,
    "scale": "log",
    "search": (1e-10, 1e-4),
    "doc": "added to the root of the second moment",
}


def _adam_coefficients(hp: HyperValues, t: Any) -> dict[str, Any]:
    beta1, beta2 = hp["betas"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "step_size": hp["lr"] / (1 - beta1**t),
        "correction": (1 - beta2**t) ** -0.5,
        "eps": hp["eps"],
    }


class Adam(ElementwiseRule):
    r"""Adam with L2 weight decay, as in ``torch.optim.Adam``.

    .. math::
        g &\leftarrow g + \lambda\, p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
        p &\leftarrow p - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Kingma and Ba, 2015 (https://arxiv.org/abs/1412.6980).
    """

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-1))
    betas: tuple[float, float] = hyper((0.9, 0.999), **_BETAS)
    eps: float = hyper(1e-8, **_EPS)
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-6, 1e-2), doc="L2 penalty")
    slots = ("exp_avg", "exp_avg_sq")

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """Bias corrections; see the class."""
        return {**_adam_coefficients(hp, t), "weight_decay": hp["weight_decay"]}

    def elementwise(
        self, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, beta2: Any, step_size: Any,
        correction: Any, eps: Any, weight_decay: Any,
    ) -> Any:  # fmt: skip
        """See the class."""
        grad = grad + weight_decay * param
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + grad * grad * (1 - beta2)
        denominator = torch.sqrt(exp_avg_sq) * correction + eps
        return param - exp_avg * step_size / denominator, exp_avg, exp_avg_sq


class AdamW(ElementwiseRule):
    r"""Adam with decoupled weight decay, as in ``torch.optim.AdamW``.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
        p &\leftarrow (1 - \eta \lambda)\, p
            - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Loshchilov and Hutter, 2019 (https://arxiv.org/abs/1711.05101).
    """

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-1))
    betas: tuple[float, float] = hyper((0.9, 0.999), **_BETAS)
    eps: float = hyper(1e-8, **_EPS)
    weight_decay: float = hyper(1e-2, 0.0, scale="log", search=(1e-4, 1.0), doc="decoupled, times lr")
    slots = ("exp_avg", "exp_avg_sq")

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """Bias corrections and decay; see the class."""
        return {**_adam_coefficients(hp, t), "decay": 1 - hp["lr"] * hp["weight_decay"]}

    def elementwise(
        self, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, beta2: Any, step_size: Any,
        correction: Any, eps: Any, decay: Any,
    ) -> Any:  # fmt: skip
        """See the class."""
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + grad * grad * (1 - beta2)
        denominator = torch.sqrt(exp_avg_sq) * correction + eps
        return param * decay - exp_avg * step_size / denominator, exp_avg, exp_avg_sq


class AMSGrad(ElementwiseRule):
    r"""AdamW (or Adam) whose second moment never falls, as ``amsgrad=True`` in torch.

    .. math:: \hat v \leftarrow \max(\hat v, v), \qquad \hat v \text{ in place of } v \text{ in the denominator}

    Reddi, Kale and Kumar, 2018 (https://openreview.net/forum?id=ryQu7f-RZ).
    """

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-1))
    betas: tuple[float, float] = hyper((0.9, 0.999), **_BETAS)
    eps: float = hyper(1e-8, **_EPS)
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-6, 1.0), doc="decoupled (times lr) or L2")
    decoupled: bool = option(True, choices=(False, True), doc="weight decay as in AdamW (True) or as in Adam (False)")
    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """Bias corrections and both kinds of decay; see the class."""
        weight_decay = hp["weight_decay"]
        return {
            **_adam_coefficients(hp, t),
            "decay": 1 - hp["lr"] * weight_decay if self.decoupled else 1.0,
            "penalty": 0.0 if self.decoupled else weight_decay,
        }

    def elementwise(
        self, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, beta1: Any, beta2: Any,
        step_size: Any, correction: Any, eps: Any, decay: Any, penalty: Any,
    ) -> Any:  # fmt: skip
        """See the class."""
        if self.decoupled:
            param = param * decay
        else:
            grad = grad + penalty * param
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + grad * grad * (1 - beta2)
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        denominator = torch.sqrt(max_exp_avg_sq) * correction + eps
        return param - exp_avg * step_size / denominator, exp_avg, exp_avg_sq, max_exp_avg_sq
