"""A rule's own ``update``, called with no optimizer in between: what exported files are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metaopt.rule import Context, PerParameter, UpdateRule, infer_info


class Functional(torch.optim.SGD):
    """Steps the parameters of ``groups`` by ``rule``; groups may set ``lr``, and parameters have names."""

    def __init__(self, rule: UpdateRule, groups: list[dict[str, Any]], horizon: int | None = None) -> None:
        super().__init__(groups, lr=rule.hp.get("lr", 1.0))
        self.rule, self.horizon = rule, horizon
        self.slots: dict[str, Any] = {}

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        """One update; the rule gets the closure's loss."""
        loss = torch.as_tensor(closure()).detach()
        groups = self.param_groups
        owners = [(name, p, g) for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)]
        params = {name: p.detach().clone() for name, p, _ in owners if p.grad is not None}
        grads = {name: p.grad.clone() for name, p, _ in owners if p.grad is not None}
        info = infer_info(params)
        own = {"lr"} & self.rule.hp.keys()
        hp = {name: {**self.rule.hp, **{key: g[key] for key in own}} for name, _, g in owners if name in params}
        new = {name: p for name, p in params.items() if name not in self.slots}
        with torch.no_grad():
            self.slots |= self.rule.init(new, info)
            context = Context(info, loss=loss, horizon=self.horizon)
            state = {name: self.slots[name] for name in params}
            moved, slots = self.rule.update(grads, state, params, PerParameter(hp), context)
            self.slots |= slots
            for name, p, _ in owners:
                if name in moved:
                    p.copy_(moved[name])
