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
    nonnegative = ("exp_avg_sq",)

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
    nonnegative = ("exp_avg_sq",)

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
    nonnegative = ("exp_avg_sq", "max_exp_avg_sq")

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


class AdaBelief(ElementwiseRule):
    r"""Adam that measures how far gradients are from their mean, with decoupled weight decay.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
            s \leftarrow \beta_2 s + (1 - \beta_2)\, (g - m)^2 + \epsilon \\
        p &\leftarrow (1 - \eta \lambda)\, p - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    Zhuang et al., 2020 (https://arxiv.org/abs/2010.07468).
    """

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-1))
    betas: tuple[float, float] = hyper((0.9, 0.999), **_BETAS)
    eps: float = hyper(1e-16, **{**_EPS, "search": (1e-16, 1e-8), "doc": "added to the variance and to its root"})
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-4, 1.0), doc="decoupled, times lr")
    slots = ("exp_avg", "exp_avg_var")

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """Bias corrections and decay; see the class."""
        return {**_adam_coefficients(hp, t), "decay": 1 - hp["lr"] * hp["weight_decay"]}

    def elementwise(
        self, param: Any, grad: Any, exp_avg: Any, exp_avg_var: Any, beta1: Any, beta2: Any, step_size: Any,
        correction: Any, eps: Any, decay: Any,
    ) -> Any:  # fmt: skip
        """See the class."""
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        surprise = grad - exp_avg
        exp_avg_var = beta2 * exp_avg_var + surprise * surprise * (1 - beta2) + eps
        denominator = torch.sqrt(exp_avg_var) * correction + eps
        return param * decay - exp_avg * step_size / denominator, exp_avg, exp_avg_var


class LAMB(ElementwiseRule):
    r"""AdamW's direction, of every tensor scaled to the length of its parameter.

    .. math::
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda\, p, \qquad
        p \leftarrow p - \eta\, \frac{\lVert p \rVert}{\lVert u \rVert}\, u

    with the ratio 1 where either norm is 0. You et al., 2020 (https://arxiv.org/abs/1904.00962), version 5.
    """

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-1))
    betas: tuple[float, float] = hyper((0.9, 0.999), **_BETAS)
    eps: float = hyper(1e-6, **_EPS)
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-4, 1.0), doc="decoupled, before the ratio")
    slots = ("exp_avg", "exp_avg_sq")

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """Bias corrections; see the class."""
        beta1, beta2 = hp["betas"]
        return {
            "beta1": beta1, "beta2": beta2, "first": 1 / (1 - beta1**t), "correction": (1 - beta2**t) ** -0.5,
            "lr": hp["lr"], "eps": hp["eps"], "weight_decay": hp["weight_decay"],
        }  # fmt: skip

    def elementwise(
        self, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, beta2: Any, first: Any,
        correction: Any, lr: Any, eps: Any, weight_decay: Any,
    ) -> Any:  # fmt: skip
        """See the class."""
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + grad * grad * (1 - beta2)
        update = exp_avg * first / (torch.sqrt(exp_avg_sq) * correction + eps) + weight_decay * param
        param_norm, update_norm = param.norm(), update.norm()
        ratio = torch.where(torch.minimum(param_norm, update_norm) > 0, param_norm / update_norm, 1.0)
        return param - lr * ratio * update, exp_avg, exp_avg_sq
