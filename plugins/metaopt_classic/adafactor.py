"""Adafactor: second moments of matrices as an outer product of row and column means."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.rule import HyperValues, ParamInfo, TensorRule
from metaopt.space import hyper, learning_rate


class Adafactor(TensorRule):
    r"""Adafactor with relative step sizes, as in ``torch.optim.Adafactor``.

    .. math::
        \rho &= \min(\eta, t^{-1/2}), \qquad \alpha = \max(\epsilon_2, \mathrm{RMS}(p))\, \rho, \qquad
            w = t^{\text{beta2\_decay}} \\
        R &\leftarrow (1 - w) R + w\, \mathrm{mean}_{cols}(g^2), \qquad
        C \leftarrow (1 - w) C + w\, \mathrm{mean}_{rows}(g^2), \qquad
        v = R C / \max(\mathrm{mean}(R), \epsilon_1) \\
        u &= g / \sqrt{\max(v, \epsilon_1^2)}, \qquad
        p \leftarrow (1 - \eta\lambda)\, p - \alpha\, u / \max(1, \mathrm{RMS}(u) / d)

    Vectors keep a whole second moment. Tensors of 3 or more dimensions are factored over their last two.
    Shazeer and Stern, 2018 (https://arxiv.org/abs/1804.04235).
    """

    lr: float = learning_rate(1e-2, search=(1e-3, 1.0))
    beta2_decay: float = hyper(-0.8, -1.0, 0.0, doc="exponent of the second moment's weight")
    eps: tuple[float, float] = hyper(
        (0.0, 1e-3),
        0.0,
        scale="log",
        search=(1e-10, 1e-2),
        doc="eps[0] = 0 stands for the machine epsilon of the dtype",
    )
    d: float = hyper(1.0, 0.0, open_low=True, scale="log", search=(0.5, 4.0), doc="RMS at which updates are clipped")
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-4, 1.0), doc="decoupled, times lr")

    def init_tensor(self, param: Tensor, info: ParamInfo) -> dict[str, Tensor]:
        """``row_var`` [..., m, 1] and ``col_var`` [..., 1, n], or ``variance`` like a vector."""
        if param.dim() < 2:
            return {"variance": torch.zeros_like(param)}
        return {
            "row_var": torch.zeros_like(param).sum(-1, keepdim=True),
            "col_var": torch.zeros_like(param).sum(-2, keepdim=True),
        }

    def update_tensor(
        self, grad: Tensor, slots: dict[str, Tensor], param: Tensor, hp: HyperValues, t: Tensor, info: ParamInfo
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        lr, eps2 = (torch.as_tensor(value, dtype=t.dtype, device=t.device) for value in (hp["lr"], hp["eps"][1]))
        machine = torch.finfo(grad.dtype).eps
        eps1 = torch.as_tensor(hp["eps"][0], dtype=t.dtype, device=t.device)
        eps1 = torch.where(eps1 > 0, eps1, torch.full_like(eps1, machine))
        weight = t ** hp["beta2_decay"]
        alpha = torch.maximum(eps2, _rms(param)) * torch.minimum(lr, t**-0.5)
        weight, alpha, eps1 = (value.to(grad.dtype) for value in (weight, alpha, eps1))

        square = grad * grad
        if "variance" in slots:
            variance = slots["variance"] + weight * (square - slots["variance"])
            new_slots, estimate = {"variance": variance}, variance
        else:
            row = slots["row_var"] + weight * (square.mean(-1, keepdim=True) - slots["row_var"])
            col = slots["col_var"] + weight * (square.mean(-2, keepdim=True) - slots["col_var"])
            new_slots = {"row_var": row, "col_var": col}
            estimate = row * col / torch.maximum(row.mean(-2, keepdim=True), eps1)
        update = grad * torch.maximum(estimate, eps1 * eps1).rsqrt()
        clip = (_rms(update) / hp["d"]).clamp(min=1.0)
        decay = (1 - lr * hp["weight_decay"]).to(grad.dtype)
        return param * decay - alpha / clip * update, new_slots


def _rms(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor) / max(tensor.numel(), 1) ** 0.5
