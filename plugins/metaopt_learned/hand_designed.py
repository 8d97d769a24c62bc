"""Hand-designed rules whose hyperparameters are learned: as constants, or as schedules."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import once
from metaopt.rule import Context, HyperValues, ParamInfo, Params, PerParameter, State, UpdateRule, hp_of
from metaopt.space import Hyper, Scale, hyper, option


class SteeredRule(LearnedRule):
    r"""A registered hand-designed rule, some of whose hyperparameters are functions of theta.

    A learned hyperparameter x is handled as an unconstrained u, by the scale that the rule declares for it:

    .. math:: x = e^u \text{ (log)}, \qquad x = 1 - e^u \text{ (decay)}, \qquad x = u \text{ (linear)}

    cut to its domain. u is computed in float64, as all scalar arithmetic of rules is. What is not learned keeps the
    default of the registered rule. Subclasses say what u is in `steered`.

    Raises:
        ValueError: no registered rule of that name, one that evaluates the loss elsewhere (it needs a closure), or
            ``learned`` names what is no hyperparameter of it or what has a default outside its scale (0 has no logarithm).
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the rule's learning rate")
    rule: str = option("adam", doc="registered hand-designed optimizer")
    learned: str = option("lr", doc="which of its hyperparameters are learned, separated by commas")

    # made of the options above; no fields, because the steered rule's own options are none of this rule's
    steered_rule: ClassVar[UpdateRule]
    defaults: ClassVar[dict[str, Any]]
    domains: ClassVar[dict[str, tuple[Scale, float, float]]]

    def __post_init__(self) -> None:
        super().__post_init__()
        # registered names only: a file of meta-parameters names its rule, and must not thereby import code
        registry.get("optimizer", self.rule)
        rule: UpdateRule = registry.create("optimizer", self.rule)
        declared, needed = rule.declared(), rule.requirements()
        names = tuple(name.strip() for name in self.learned.split(","))
        for name in names:
            if not isinstance(declared.get(name), Hyper):
                raise ValueError(
                    f"learned must name hyperparameters of {self.rule!r} ({', '.join(rule.hp)}), separated by commas; "
                    f"it has no {name!r}"
                )
        if "closure" in needed:
            raise ValueError(f"rule must make do with one gradient, but {self.rule!r} evaluates the loss elsewhere")
        made = {
            "steered_rule": rule,
            "defaults": dict(rule.hp),
            "domains": {name: _domain(declared[name]) for name in names},
            "needs_loss": type(self).needs_loss or "loss" in needed,
            "needs_horizon": type(self).needs_horizon or "horizon" in needed,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        self.unconstrained_defaults()  # refuses those that have none

    def unconstrained_defaults(self) -> Theta:
        """u of the registered rule's own values: one entry per learned hyperparameter, [] or [n] for tuples; float32."""
        return {name: _unconstrained(name, self.defaults[name], self.domains[name][0]) for name in self.domains}

    def hyperparameters(self, raw: Mapping[str, Tensor], lr: Any) -> dict[str, Any]:
        """The steered rule's hyperparameters for ``raw`` (u of every learned one), its learning rate times ``lr``."""
        found = dict(self.defaults)
        for name, (scale, low, high) in self.domains.items():
            u = raw[name].to(torch.float64)
            x = torch.exp(u) if scale == "log" else -torch.expm1(u) if scale == "decay" else u
            x = x.clamp(low, high)
            found[name] = x.unbind(-1) if x.dim() else x
        found["lr"] = found["lr"] * lr
        return found

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """The steered rule's state."""
        return self.steered_rule.init(params, info)

    @abstractmethod
    def steered(self, theta: Theta, step: Tensor, horizon: Tensor | int | None) -> Mapping[str, Tensor]:
        """u of every learned hyperparameter before update number ``step`` (0-d, from 0)."""

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The steered rule's update."""
        if ctx.step is not None and not isinstance(hp, PerParameter):
            values: HyperValues = self.hyperparameters(self.steered(theta, ctx.step, ctx.horizon), hp["lr"])
        else:
            steps = {name: ctx.updates_of(state[name]) for name in params}
            raw = once(lambda step: self.steered(theta, step, ctx.horizon), steps)
            values = PerParameter({n: self.hyperparameters(raw[n], hp_of(hp, n)["lr"]) for n in params})
        return self.steered_rule.update(grads, state, params, values, ctx)


class LearnedHyperparameters(SteeredRule):
    r"""A hand-designed rule with constant hyperparameters that are meta-parameters: theta is u itself.

    .. math:: \eta = e^{\theta_{lr}}, \qquad \beta = 1 - e^{\theta_{\beta}}, \qquad \epsilon = e^{\theta_{\epsilon}}

    for Adam, for example, where theta starts at the defaults. The learnable SGD, momentum and Adam of Metz et al., 2022
    (https://arxiv.org/abs/2203.11860) are three settings of this rule, with 1, 2 and 4 meta-parameters.
    """

    def init_theta(self, generator: Generator) -> Theta:
        """The registered rule's own values; nothing is drawn."""
        return self.unconstrained_defaults()

    def steered(self, theta: Theta, step: Tensor, horizon: Tensor | int | None) -> Mapping[str, Tensor]:
        """Theta, at every step."""
        return theta


class LearnedSchedule(SteeredRule):
    r"""A hand-designed rule with learned schedules: each u is piecewise linear in the progress of training.

    .. math:: u(t) = \sum_j \theta_j \max(0, 1 - |(n - 1) \min(t / T, 1) - j|), \qquad j = 0, \dots, n - 1

    with t the updates made, T the horizon and n = ``knots``. Theta starts at the registered rule's constants. A learned
    instance of dynamic algorithm configuration without observations: Biedenkapp et al., 2020
    (https://doi.org/10.3233/FAIA200122).
    """

    needs_horizon = True
    knots: int = option(8, low=2, doc="knots n of each schedule, evenly over the horizon")

    def init_theta(self, generator: Generator) -> Theta:
        """Constant schedules at the registered rule's values, [knots] or [knots, n]; nothing is drawn."""
        return {name: u.expand(self.knots, *u.shape).clone() for name, u in self.unconstrained_defaults().items()}

    def steered(self, theta: Theta, step: Tensor, horizon: Tensor | int | None) -> Mapping[str, Tensor]:
        """The schedules at ``step``."""
        done = progress(step, horizon)
        return {name: piecewise_linear(theta[name], done) for name in self.domains}


def progress(step: Tensor, horizon: Tensor | int | None) -> Tensor:
    """The part min(t / T, 1) of training that is done, 0-d float64.

    Raises:
        ValueError: no horizon is known.
    """
    if horizon is None:
        raise ValueError("this rule follows the progress of training; pass horizon=..., the planned number of steps")
    planned = torch.as_tensor(horizon, device=step.device)
    return (step.to(torch.float64) / planned).clamp(0.0, 1.0)


def piecewise_linear(knots: Tensor, done: Tensor) -> Tensor:
    """The value [...] at ``done`` (0-d float64 in [0, 1]) between ``knots`` [n, ...], which are evenly spaced; float64."""
    hats = torch.relu(1 - (done * (len(knots) - 1) - torch.arange(len(knots), device=done.device)).abs())
    return torch.tensordot(hats, knots.to(torch.float64), 1)


def _domain(declared: Any) -> tuple[Scale, float, float]:
    """Scale, lowest and highest value of a hyperparameter; all finite."""
    low = math.nextafter(declared.low, math.inf) if declared.open_low else declared.low
    high = math.nextafter(declared.high, -math.inf) if declared.open_high else declared.high
    return declared.scale, max(low, -sys.float_info.max), min(high, sys.float_info.max)


def _unconstrained(name: str, value: Any, scale: Scale) -> Tensor:
    """u of one hyperparameter's value, or of a tuple of them."""
    if isinstance(value, tuple):
        return torch.stack([_unconstrained(name, entry, scale) for entry in value])
    if (scale == "log" and value <= 0) or (scale == "decay" and value >= 1):
        raise ValueError(f"{name} cannot be learned: its default is {value:g}, which is no point on a {scale} scale")
    return torch.tensor(math.log(value) if scale == "log" else math.log1p(-value) if scale == "decay" else value)
