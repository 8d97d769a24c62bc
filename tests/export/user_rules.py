"""A user's own module: rules that lean on helpers, constants, inheritance and other modules in many ways."""

from __future__ import annotations

import functools
import math
import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import maximum as larger

from metaopt import tree
from metaopt import where as branch
from metaopt.rule import (
    Context,
    ElementwiseRule,
    GradientTransform,
    HyperValues,
    ParamInfo,
    Params,
    State,
    TensorRule,
    UpdateRule,
    hp_of,
)
from metaopt.space import hyper, learning_rate, option
from metaopt_classic.adam import AdamW

FLOOR: float = 1e-3
SCALES = {"small": 0.5 * FLOOR, "large": 2.0}
_GRID = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
_INNER = AdamW(lr=0.5)


class Norms(NamedTuple):
    """Two norms."""

    grad: Tensor
    param: Tensor


@dataclass(frozen=True)
class Bounds:
    """Where a ratio may lie."""

    low: float = FLOOR
    high: float = 10.0

    def clip(self, x: Tensor) -> Tensor:
        """Into the bounds."""
        return x.clamp(self.low, self.high)


BOUNDS = Bounds(high=5.0)


@functools.cache
def _power(base: float, exponent: int = 2) -> float:
    return math.pow(base, exponent)


def _norms(grad: Tensor, param: Tensor) -> Norms:
    return Norms(grad.norm() + FLOOR, larger(param.norm(), torch.full_like(param.norm(), FLOOR)))


class Base(TensorRule):
    """What the rules below share."""

    lr: float = learning_rate(0.01, search=(1e-3, 1e-1))
    decay: float = hyper(0.9, 0.0, 1.0, open_high=True)
    twice: bool = option(True, choices=(False, True))
    EXPONENTS = (2, 3)

    @property
    def factor(self) -> int:
        """2 or 1."""
        return 2 if self.twice else 1

    @staticmethod
    def blend(a: Tensor, b: Tensor, weight: Any) -> Tensor:
        """A mean."""
        return weight * a + (1 - weight) * b

    @classmethod
    def exponent(cls) -> int:
        """The first."""
        return cls.EXPONENTS[0]

    def init_tensor(self, param: Tensor, info: ParamInfo) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(param)}

    def update_tensor(
        self, grad: Tensor, slots: dict[str, Tensor], param: Tensor, hp: HyperValues, t: Tensor, info: ParamInfo
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mean: Tensor = self.blend(slots["mean"], grad, hp["decay"])
        return param - self.rate(hp, t) * self.direction(mean, param), {"mean": mean}

    def rate(self, hp: HyperValues, t: Tensor) -> Any:
        """Warms up."""
        return hp["lr"] * float(branch(t < 3, 0.5, 1.0)) * self.factor * _power(1.0)

    @abstractmethod
    def direction(self, mean: Tensor, param: Tensor) -> Tensor: ...

    def never_called(self) -> Any:
        """Reaches what no file may hold; no matter."""
        return np.zeros(3)


class Trust(Base):
    """LARS-like: ``\\|p\\| / \\|g\\|``, by inheritance, super, properties and constants of several kinds."""

    def init_tensor(self, param: Tensor, info: ParamInfo) -> dict[str, Tensor]:
        """One slot more than the base's, and one that remembers the last parameters as they are."""
        return {**super().init_tensor(param, info), "previous": param}

    def update_tensor(
        self, grad: Tensor, slots: dict[str, Tensor], param: Tensor, hp: HyperValues, t: Tensor, info: ParamInfo
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pulled = grad + 1e-3 * (param - slots["previous"])
        new, kept = super().update_tensor(pulled, {"mean": slots["mean"]}, param, hp, t, info)
        return new, {**kept, "previous": param}

    def direction(self, mean: Tensor, param: Tensor) -> Tensor:
        """See the class."""
        from metaopt.tree import leaves

        norms = _norms(mean, param)
        ratio = BOUNDS.clip(norms.param / norms.grad) * SCALES["large"] ** self.exponent()
        grid = sum(float(x) for x in leaves(tree.map_tree(lambda x: x.to(mean.dtype), {"a": _GRID[1]})))
        return F.softsign(mean) * ratio * grid


class Delegating(UpdateRule):
    """Uses a rule that is a constant of its module, and a helper that has the name of a wrapper's part."""

    lr: float = learning_rate(0.01, search=(1e-3, 1e-1))
    start: float = hyper(0.25, 0.0, doc="initial value of the slot")

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        state = _INNER.init(params, info)
        return {name: {**slots, "extra": torch.full_like(params[name], self.start)} for name, slots in state.items()}

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        inner_hp = {**_INNER_HP, "lr": 0.02}
        extra = {name: slots["extra"] for name, slots in state.items()}
        rest = {name: {k: v for k, v in slots.items() if k != "extra"} for name, slots in state.items()}
        new, kept = _INNER.update(grads, rest, params, inner_hp, ctx)
        new = {name: p - hp_of(hp, name)["lr"] * extra[name] * ctx.info[name].fan_in for name, p in new.items()}
        return new, {name: {**slots, "extra": extra[name] * 0.5} for name, slots in kept.items()}


_INNER_HP = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


class Normalised(GradientTransform):
    """Remembers the largest norm of each gradient."""

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        state = super().init(params, info)
        return {name: {**slots, "largest": torch.zeros_like(params[name]).sum()} for name, slots in state.items()}

    def transform(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        largest = {name: torch.maximum(state[name]["largest"], g.norm()) for name, g in grads.items()}
        return {n: g / (largest[n] + FLOOR) for n, g in grads.items()}, {n: {"largest": x} for n, x in largest.items()}


class Polyak(UpdateRule):
    """A step as long as the loss says; needs the loss and, for its decay, the horizon."""

    needs_loss = True
    needs_horizon = True
    lr: float = learning_rate(0.1, search=(1e-2, 1.0))

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        return {name: {"step": torch.zeros((), dtype=torch.int64)} for name in params}

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        assert ctx.loss is not None and ctx.horizon is not None
        square = sum(((g * g).sum() for g in grads.values()), torch.zeros(()))
        new = {}
        for name, p in params.items():
            left = 1 - state[name]["step"] / (ctx.horizon + 1)
            new[name] = p - hp["lr"] * left * (ctx.loss / (square + FLOOR)).to(p.dtype) * grads[name]
        return new, {name: {"step": slots["step"] + 1} for name, slots in state.items()}


class Corners(ElementwiseRule):
    """Scalars that Python refuses (a root of -1, 1 / 0), slots with initial values, outputs that are inputs."""

    lr: float = learning_rate(0.01, search=(1e-3, 1e-1))
    initial: float = hyper(0.1, 0.0)
    slots = ("accumulator", "first", "last", "count")

    def init_slot(self, slot: str, param: Tensor) -> Tensor:
        if slot == "accumulator":
            return torch.full_like(param, self.initial)
        return param.clone() if slot == "first" else torch.zeros_like(param)

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        shrink = branch(t > 4, ((t - 4) / (t + 1)) ** 0.5, 1 / t)
        root = branch(t > 2, torch.sqrt(t - 2), 1.0) if not isinstance(t, (int, float)) else 1.0
        return {"lr": hp["lr"] * shrink, "inverse": branch(t > 1, root / (t - 1), 0.0), "t": t}

    def elementwise(self, param: Any, grad: Any, accumulator: Any, first: Any, last: Any, count: Any, lr: Any, inverse: Any, t: Any) -> Any:  # type: ignore[override]  # noqa: E501  # fmt: skip
        accumulator = accumulator + grad * grad
        turned = (grad > 0) * torch.where(last > 0, 1.0, 0.3) - torch.where(grad > last, grad, 0.1)
        step = lr * (grad + 0.1 * turned) / torch.sqrt(accumulator) + 1e-3 * inverse * (param - first)
        return param - step, accumulator, first, grad, t


# --- what cannot be exported ----------------------------------------------------------------------------------------


class UsesNumpy(Base):
    """A third-party package."""

    def direction(self, mean: Tensor, param: Tensor) -> Tensor:
        return mean * float(np.sqrt(4.0))


class UsesDeclarations(Base):
    """The machinery that files do not have."""

    def direction(self, mean: Tensor, param: Tensor) -> Tensor:
        return mean * self.hp["lr"]


class UsesClasses(Base):
    """A rule made while running."""

    def direction(self, mean: Tensor, param: Tensor) -> Tensor:
        return mean * AdamW().hp["lr"]


class UsesModule(Base):
    """An object that no text describes."""

    out: Any = option(sys.stdout)

    def direction(self, mean: Tensor, param: Tensor) -> Tensor:
        self.out.flush()
        return mean


class UsesUndefined(Base):
    """A name that is nowhere."""

    def direction(self, mean: Tensor, param: Tensor) -> Tensor:
        return mean * nowhere  # type: ignore[name-defined]  # noqa: F821
