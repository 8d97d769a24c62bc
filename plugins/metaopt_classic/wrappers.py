"""Wrappers: rules made of rules, and gradient transforms for `metaopt.rule.Chain`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaopt.rule import (
    Context,
    GradientTransform,
    HyperValues,
    ParamInfo,
    Params,
    PerParameter,
    State,
    UpdateRule,
    hp_of,
    without,
)
from metaopt.space import hyper, option


def _global_norm(grads: Params) -> Tensor:
    """L2 norm of all gradients together, in float32 or better; its derivative at 0 is 0."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads.values()]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


class ClipByGlobalNorm(GradientTransform):
    r"""Scale all gradients by :math:`\min(1, c / \|g\|)`, with the norm over all parameters of all groups.

    Pascanu, Mikolov and Bengio, 2013 (https://arxiv.org/abs/1211.5063).
    """

    max_norm: float = hyper(1.0, 0.0, open_low=True, scale="log", search=(0.01, 10.0), doc="largest allowed norm")

    def transform(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        if not grads:
            return grads, {}
        norm = _global_norm(grads)
        limit = torch.as_tensor(hp["max_norm"], dtype=norm.dtype, device=norm.device)
        scale = limit / torch.maximum(norm, limit)
        return {name: g * scale.to(dtype=g.dtype, device=g.device) for name, g in grads.items()}, {}


class DecoupledWeightDecay(UpdateRule):
    r"""Any rule without weight decay, plus :math:`p \leftarrow p - \eta \lambda p_{old}`.

    Loshchilov and Hutter, 2019 (https://arxiv.org/abs/1711.05101).
    """

    rule: UpdateRule
    weight_decay: float = hyper(1e-2, 0.0, scale="log", search=(1e-4, 1.0), doc="times the rule's lr")

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state."""
        return self.rule.init(params, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The rule's step and the decay, both from the old parameters."""
        new_params, new_state = self.rule.update(grads, state, params, hp, ctx)
        decayed = {}
        for name, param in params.items():
            own = hp_of(hp, name)
            decay = own["lr"] * own["weight_decay"] * param
            decayed[name] = new_params[name] - decay.to(param.dtype)  # a 0-d float64 lr would widen a 0-d parameter
        return decayed, new_state


class Lookahead(UpdateRule):
    r"""Every ``k`` steps, move slow weights towards the fast ones and restart the fast ones there.

    .. math:: s \leftarrow s + \alpha\, (p - s), \quad p \leftarrow s \qquad \text{when } t \bmod k = 0

    Zhang et al., 2019 (https://arxiv.org/abs/1907.08610).
    """

    rule: UpdateRule
    lookahead_alpha: float = hyper(0.5, 0.0, 1.0, doc="how far the slow weights move")
    k: int = option(5, low=1, doc="fast steps per slow one")

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state, and ``slow``: a copy of the parameter."""
        state = self.rule.init(params, info)
        return {name: {**state[name], "slow": param.clone()} for name, param in params.items()}

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class; ``t`` is each parameter's own step count."""
        inner = without(state, {name: {"slow": None} for name in params})
        fast, new_state = self.rule.update(grads, inner, params, hp, ctx)
        new_params = {}
        for name, param in fast.items():
            slow = state[name]["slow"]
            sync = new_state[name]["step"].to(param.device) % self.k == 0
            moved = hp_of(hp, name)["lookahead_alpha"] * (param - slow)
            slow = torch.where(sync, slow + moved.to(slow.dtype), slow)
            new_params[name] = torch.where(sync, slow, param)
            new_state[name] = {**new_state[name], "slow": slow}
        return new_params, new_state


class Cautious(UpdateRule):
    r"""Drop the entries of an update that point uphill, and scale the rest up to make good for them.

    .. math:: u \leftarrow u \cdot \mathbb{1}[u g > 0] / \max(\mathrm{mean}(\mathbb{1}[u g > 0]), 10^{-3})

    u is the rule's step at weight decay 0; decoupled decay, if the rule has a ``weight_decay`` that is decoupled
    (``decoupled_decay``), is applied beside it, uncut.
    Liang et al., 2024 (https://arxiv.org/abs/2411.16085), Algorithm 2.
    """

    rule: UpdateRule
    decoupled_decay: bool = option(True, choices=(False, True), doc="the rule's weight_decay is decoupled, as in AdamW")

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state."""
        return self.rule.init(params, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        split = self.decoupled_decay and "weight_decay" in hp
        undecayed = _with(hp, params, weight_decay=0.0) if split else hp
        stepped, new_state = self.rule.update(grads, state, params, undecayed, ctx)
        new_params = {}
        for name, param in params.items():
            step = param - stepped[name]
            agrees = (step * grads[name] > 0).to(step.dtype)
            step = step * agrees / agrees.mean().clamp(min=1e-3)
            own = hp_of(hp, name)
            decay = 1 - own["lr"] * own["weight_decay"] if split else 1.0
            new_params[name] = (param * decay).to(step.dtype) - step
        return new_params, new_state


class SAM(UpdateRule):
    r"""Sharpness-aware minimisation: the rule's step with the gradient at :math:`p + \rho\, g / \|g\|`.

    Needs a closure. Foret et al., 2021 (https://arxiv.org/abs/2010.01412).
    """

    needs_closure = True
    rule: UpdateRule
    rho: float = hyper(0.05, 0.0, scale="log", search=(0.01, 0.5), doc="radius of the neighbourhood")

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state."""
        return self.rule.init(params, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """One extra evaluation, uphill, then the rule's step from the old parameters."""
        if ctx.closure is None:
            raise ValueError("SAM evaluates the loss a second time; call step(closure) with a closure")
        scale = hp["rho"] / (_global_norm(grads) + 1e-12)
        uphill = {n: p + (scale.to(p.device) * grads[n]).to(p.dtype) for n, p in params.items()}
        _, sharp = ctx.closure(uphill)
        return self.rule.update(sharp, state, params, hp, ctx)


def _with(hp: HyperValues, params: Params, **values: float) -> HyperValues:
    if isinstance(hp, PerParameter):
        return PerParameter({name: {**hp.of(name), **values} for name in params})
    return {**hp, **values}
