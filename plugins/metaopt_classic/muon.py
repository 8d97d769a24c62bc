"""Muon: orthogonalised momentum for hidden matrices, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.matrix import newton_schulz
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, TensorRule, compute_dtype, hp_of
from metaopt.space import hyper, learning_rate, option
from metaopt_classic.adam import AdamW

_ADAMW = AdamW()


class Muon(TensorRule):
    r"""Muon on parameters of role ``hidden`` with two or more dimensions; AdamW on the rest.

    .. math::
        m &\leftarrow \beta m + (1 - \beta)\, g, \qquad
        h = \beta m + (1 - \beta)\, g \text{ if nesterov, else } m \\
        p &\leftarrow (1 - \eta\lambda)\, p - \eta\, s\, \mathrm{NS}(h)

    NS is the quintic Newton-Schulz iteration with (3.4445, -4.7750, 2.0315); convolutions are matrices
    [out, in * kernel]. With ``scaling="original"`` s = sqrt(max(1, rows / columns)); with ``"match_rms_adamw"``
    s = 0.2 sqrt(max(rows, columns)), so that one lr suits both halves (Moonlight, https://arxiv.org/abs/2502.16982).
    ``bias_correction`` divides m by 1 - beta^t and g by the same, with NAdam-like Nesterov (optax's form).
    Equal shapes are stacked and orthogonalised together.
    Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/).
    """

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-1))
    momentum: float = hyper(0.95, 0.0, 1.0, open_high=True, scale="decay", search=(0.8, 0.99), doc="EMA decay")
    weight_decay: float = hyper(0.1, 0.0, scale="log", search=(1e-3, 1.0), doc="decoupled, times lr; everywhere")
    adam_lr_ratio: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="AdamW's lr over Muon's")
    adam_betas: tuple[float, float] = hyper(
        (0.9, 0.95), 0.0, 1.0, open_high=True, scale="decay", search=(0.8, 0.999), doc="AdamW's EMA decays"
    )
    eps: float = hyper(1e-8, 0.0, scale="log", search=(1e-10, 1e-4), doc="of the Frobenius norm, and of AdamW")
    nesterov: bool = option(True, choices=(False, True))
    bias_correction: bool = option(False, choices=(False, True))
    scaling: str = option("match_rms_adamw", choices=("match_rms_adamw", "original"))
    ns_steps: int = option(5, low=1, doc="Newton-Schulz iterations")

    def init_tensor(self, param: Tensor, info: ParamInfo) -> dict[str, Tensor]:
        """``momentum_buffer`` for hidden matrices, AdamW's slots elsewhere."""
        if _is_matrix(info):
            return {"momentum_buffer": torch.zeros_like(param)}
        return _ADAMW.init_tensor(param, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """Orthogonalise all matrices, equal shapes at once, then finish tensor by tensor."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, info in ctx.info.items():
            if name in params and _is_matrix(info):
                alike = (tuple(params[name].shape), params[name].dtype, params[name].device, hp_of(hp, name)["eps"])
                groups.setdefault(alike, []).append(name)
        directions: Params = {}
        buffers: Params = {}
        for names in groups.values():
            heavy = []
            for name in names:
                grad, buffer = grads[name].to(compute_dtype(params[name].dtype)), state[name]["momentum_buffer"]
                t = ctx.updates_of(state[name]).to(torch.float64) + 1
                buffers[name], ahead = self._momentum(grad, buffer, hp_of(hp, name)["momentum"], t)
                heavy.append(ahead.flatten(1))
            orthogonal = newton_schulz(torch.stack(heavy), self.ns_steps, hp_of(hp, names[0])["eps"])
            directions |= {name: orthogonal[i].reshape(params[name].shape) for i, name in enumerate(names)}
        new_params: Params = {}
        new_state: State = {}
        for name, param in params.items():
            dtype, own = compute_dtype(param.dtype), hp_of(hp, name)
            if name in directions:
                rate = own["lr"] * self._scale(tuple(param.shape))
                moved = param.to(dtype) * (1 - own["lr"] * own["weight_decay"]) - rate * directions[name]
                slots = {"momentum_buffer": buffers[name]}
            else:
                t = (ctx.updates_of(state[name]) + 1).to(torch.float64)
                old = {slot: value for slot, value in state[name].items() if slot != "step"}
                moved, slots = self.update_tensor(grads[name].to(dtype), old, param.to(dtype), own, t, ctx.info[name])
            new_params[name], new_state[name] = moved.to(param.dtype), {"step": state[name]["step"] + 1, **slots}
        return new_params, new_state

    def update_tensor(
        self, grad: Tensor, slots: dict[str, Tensor], param: Tensor, hp: HyperValues, t: Tensor, info: ParamInfo
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AdamW, for what is no hidden matrix."""
        adam = {
            "lr": hp["lr"] * hp["adam_lr_ratio"],
            "betas": hp["adam_betas"],
            "eps": hp["eps"],
            "weight_decay": hp["weight_decay"],
        }
        return _ADAMW.update_tensor(grad, slots, param, adam, t, info)

    def _momentum(self, grad: Tensor, buffer: Tensor, beta: Tensor | float, t: Tensor) -> tuple[Tensor, Tensor]:
        buffer = beta * buffer + (1 - beta) * grad
        if not self.bias_correction:
            return buffer, beta * buffer + (1 - beta) * grad if self.nesterov else buffer
        now, later = ((1 - beta ** (t + ahead)).to(grad.dtype) for ahead in (0, 1))
        return buffer, beta * buffer / later + (1 - beta) * grad / now if self.nesterov else buffer / now

    def _scale(self, shape: tuple[int, ...]) -> float:
        rows, columns = shape[0], 1
        for size in shape[1:]:
            columns *= size
        if self.scaling == "original":
            return max(1.0, rows / columns) ** 0.5
        return 0.2 * max(rows, columns) ** 0.5


def _is_matrix(info: ParamInfo) -> bool:
    return info.role == "hidden" and len(info.shape) >= 2
