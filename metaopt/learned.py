"""The contract of a learned optimizer: a rule with meta-parameters theta."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.rule import Context, Declared, HyperValues, ParamInfo, Params, State, UpdateRule

Theta = dict[str, Tensor]
"""Meta-parameters, flat. Under ES every tensor has a leading copy dimension; under backpropagation it requires grad."""


class LearnedRule(Declared):
    """An update rule whose numbers are learned; ``bind(theta)`` makes an `UpdateRule` of it."""

    needs_loss = False
    needs_horizon = False
    needs_roles = False

    @abstractmethod
    def init_theta(self, generator: Generator) -> Theta:
        """Fresh meta-parameters (float32, CPU), determined by the generator."""

    @abstractmethod
    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """As `UpdateRule.init`."""

    @abstractmethod
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """As `UpdateRule.update`, with ``theta`` of one copy; pure, vmap-safe, differentiable in theta."""

    def bind(self, theta: Theta, *, stacked: bool = False) -> BoundRule:
        """This rule with these meta-parameters, usable wherever a rule is.

        ``stacked``: every tensor of theta has a leading dimension, one entry per copy of an unroll.
        """
        return BoundRule(self, theta, stacked)


class BoundRule(UpdateRule, eq=False):
    """A learned rule and its theta; all consumers of rules take one."""

    learned: LearnedRule
    theta: Theta
    stacked: bool = False

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The learned rule's initial state."""
        return self.learned.init(params, info, self.theta)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The learned rule's step with this theta, moved to where the parameters are."""
        device = next(iter(params.values())).device if params else None
        theta = {name: value.to(device) for name, value in self.theta.items()}
        return self.learned.update(theta, grads, state, params, hp, ctx)

    def label(self) -> str:
        """The learned rule's."""
        return self.learned.label()

    def requirements(self) -> set[str]:
        """What the learned rule needs."""
        return {what for what in ("loss", "horizon", "roles") if getattr(self.learned, f"needs_{what}")}

    def to(self, device: Any) -> BoundRule:
        """The same rule with theta on ``device``."""
        return BoundRule(self.learned, {name: value.to(device) for name, value in self.theta.items()}, self.stacked)


def to_vector(theta: Theta) -> Tensor:
    """All of theta as one vector [D], tensors in order of insertion."""
    return torch.cat([value.reshape(-1) for value in theta.values()])


def from_vector(vector: Tensor, like: Theta) -> Theta:
    """Inverse of `to_vector`, for ``vector`` [..., D]; leading dimensions stay."""
    pieces = torch.split(vector, [value.numel() for value in like.values()], dim=-1)
    return {
        name: piece.reshape(vector.shape[:-1] + value.shape)
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def digest(theta: Theta) -> str:
    """sha256, in hex, of the names, shapes, dtypes and numbers of theta, wherever it lives and in whatever order."""
    found = hashlib.sha256()
    for name, value in sorted(theta.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
