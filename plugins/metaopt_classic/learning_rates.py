"""Learning rates that differ over time and between roles of parameters: wrappers around any rule with an ``lr``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.resolve import resolve_rule
from metaopt.rule import Context, HyperValues, ParamInfo, Params, PerParameter, State, UpdateRule, hp_of
from metaopt.space import hyper, option

SCHEDULES = ("constant", "linear", "cosine", "wsd")
_DECAYING = ("linear", "cosine", "wsd")
_COOLDOWN = 0.2  # of the run, as in Hu et al., 2024


class Scheduled(UpdateRule):
    r"""Any rule, its ``lr`` times a schedule over the horizon: linear warm-up, then one of four shapes.

    With t the updates made, T the horizon, w = ``warmup``, f = ``final_lr`` and q = max(0, t/T - w) / (1 - w):

    .. math::
        s(t) = \min\left(1, \frac{t + 1}{w T}\right) \cdot \begin{cases}
            1 & \text{constant} \\
            1 - (1 - f)\, q & \text{linear} \\
            f + (1 - f)\, (1 + \cos \pi q) / 2 & \text{cosine} \\
            1 - (1 - f) \max(0, 1 - (1 - q) / 0.2) & \text{wsd}
        \end{cases}

    Cosine: Loshchilov and Hutter, 2017 (https://arxiv.org/abs/1608.03983); wsd (warm-up, stable, decay): Hu et al., 2024
    (https://arxiv.org/abs/2404.06395).
    """

    needs_horizon = True
    rule: UpdateRule
    schedule: str = option("cosine", choices=SCHEDULES)
    warmup: float = hyper(0.05, 0.0, 1.0, open_high=True, search=(0.0, 0.3), doc="share of the run that warms up")
    final_lr: float = hyper(
        0.0, 0.0, 1.0, search=(0.0, 0.5), doc="share of lr at the end", when=("schedule", _DECAYING)
    )

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state."""
        return self.rule.init(params, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The rule's step with each parameter's lr at its time."""
        if ctx.horizon is None:
            raise ValueError("a schedule needs the planned number of steps; pass horizon=...")
        by_param = {}
        for name in params:
            own = hp_of(hp, name)
            factor = self.factor(ctx.updates_of(state[name]), ctx.horizon, own["warmup"], own["final_lr"])
            by_param[name] = {**own, "lr": own["lr"] * factor}
        if ctx.step is not None and not isinstance(hp, PerParameter):  # all alike: the rule may take them as one
            return self.rule.update(grads, state, params, next(iter(by_param.values()), hp), ctx)
        return self.rule.update(grads, state, params, PerParameter(by_param), ctx)

    def factor(self, step: Tensor, horizon: Tensor | int, warmup: Any, final_lr: Any) -> Tensor:
        """s(t), float64."""
        done = (step.to(torch.float64) / torch.as_tensor(horizon, device=step.device)).clamp(0.0, 1.0)
        rest = ((done - warmup) / (1 - warmup)).clamp(0.0, 1.0)
        rise = ((step + 1).to(torch.float64) / (warmup * horizon + 1e-12)).clamp(0.0, 1.0)
        if self.schedule == "constant":
            return rise
        gone = {
            "linear": rest,
            "cosine": (1 - torch.cos(math.pi * rest)) / 2,
            "wsd": (1 - (1 - rest) / _COOLDOWN).clamp(min=0.0),
        }[self.schedule]
        return rise * (1 - (1 - final_lr) * gone)


class ByRole(UpdateRule):
    r"""Any rule, its ``lr`` times a factor for each role of parameters: :math:`\eta_{role} = \eta\, \rho_{role}`.

    Hidden matrices have the rule's own. Per-layer rates as in Yang et al., 2022 (https://arxiv.org/abs/2203.03466), found by
    search instead of theory.
    """

    rule: UpdateRule
    input_lr: float = hyper(
        1.0, 0.0, scale="log", search=(0.1, 10.0), doc="lr of input weights over that of hidden ones"
    )
    output_lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="... of output weights")
    embedding_lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="... of embeddings")
    vector_lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="... of biases, norms and scalars")

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state."""
        return self.rule.init(params, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The rule's step with each parameter's own lr."""
        by_param = {}
        for name in params:
            own, role = hp_of(hp, name), ctx.info[name].role
            kind = role if role in ("input", "output", "embedding") else "vector"
            by_param[name] = dict(own) if role == "hidden" else {**own, "lr": own["lr"] * own[f"{kind}_lr"]}
        return self.rule.update(grads, state, params, PerParameter(by_param), ctx)


def scheduled(rule: UpdateRule | str = "adamw", **values: Any) -> Scheduled:
    """`Scheduled` around a rule or the name of one; ``values`` are its own and the rule's."""
    return Scheduled(resolve_rule(rule)).replaced(**values)


def by_role(rule: UpdateRule | str = "adamw", **values: Any) -> ByRole:
    """`ByRole` around a rule or the name of one; ``values`` are its own and the rule's."""
    return ByRole(resolve_rule(rule)).replaced(**values)
