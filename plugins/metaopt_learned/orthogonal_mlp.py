"""A learned direction, orthogonalised, with a learned schedule: Celo2's class, from Adam's direction as a start."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.matrix import newton_schulz
from metaopt.perparameter import Features, Prepared, once, random_layers
from metaopt.rule import Context, HyperValues, Params, State
from metaopt.space import learning_rate, option
from metaopt_learned.celo2 import NEWTON_SCHULZ_EPS, NEWTON_SCHULZ_STEPS, Celo2Base
from metaopt_learned.hand_designed import piecewise_linear, progress
from metaopt_learned.timed_mlp import named


class OrthogonalMLP(Celo2Base):
    r"""`Celo2Base` on every parameter, its direction orthogonalised on matrices, its steps on a learned schedule.

    .. math::
        p \leftarrow (1 - \eta_t\lambda)\, p - \eta_t\, u / \mathrm{rms}(u), \qquad
        \eta_t = \eta\, (1 - t/T)\, e^{\sum_j \phi_j \max(0, 1 - |(n - 1) t / T - j|)}

    with T the horizon, t updates made, n = ``knots`` and u = NS(d) for matrices [out, in * kernel], u = d for vectors. The
    features and RMS are those of the whole tensor. Differs from Celo2 in that vectors and embeddings get no AdamW, in the
    schedule, and in the start: with ``start="adam"`` the untrained network's direction is the feature m_1 r, so that
    meta-training begins at orthogonalised Adam with linear decay.
    """

    needs_horizon = True
    lr: float = learning_rate(1e-2, search=(1e-4, 1e-1))
    knots: int = option(6, low=2, doc="knots n of the schedule, evenly over the horizon")
    start: str = option("adam", choices=("adam", "random"), doc="what the untrained network computes")

    @cached_property
    def features(self) -> Features:
        """Those of `Celo2Base`, normalised over the whole tensor."""
        return self._features(norm="tensor")

    def init_theta(self, generator: Generator) -> Theta:
        """As `Celo2Base`, or with two hidden units of each layer that pass m_1 r on while no other is read yet."""
        sizes = (self.features.count((1, 1)), self.hidden, self.hidden, 1)
        theta = named(random_layers(sizes, generator))
        if self.start == "adam":
            if self.hidden < 2:
                raise ValueError("start='adam' takes two hidden units; set hidden of at least 2, or start='random'")
            scaled_momentum = sum(map(self.features.planes, self.features.blocks[: self.features.blocks.index("m_r")]))
            signs = torch.tensor([1.0, -1.0])
            theta["w0"][:, :2] = 0
            theta["w0"][scaled_momentum, :2] = signs
            theta["w1"][:, :2] = 0
            theta["w1"][:2, :2] = torch.eye(2)
            theta["w2"][:, 0] = 0
            theta["w2"][:2, 0] = signs
        return {**theta, "schedule": torch.zeros(self.knots)}

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """As `Celo2Base`, with scheduled scales."""
        prepared = super().prepare(theta, state, params, hp, ctx)

        def factor(step: Tensor) -> Tensor:
            done = progress(step, ctx.horizon)
            return ((1 - done) * torch.exp(piecewise_linear(theta["schedule"], done))).to(theta["schedule"].dtype)

        factors = once(factor, {name: ctx.updates_of(state[name]) for name in params})
        scale = {name: value * factors[name] for name, value in prepared.scale.items()}
        keep = {name: 1 - (1 - value) * factors[name] for name, value in prepared.keep.items()}
        return prepared._replace(scale=scale, keep=keep)

    def shaped(self, direction: Tensor) -> Tensor:
        """Matrices orthogonalised, each kernel as one matrix."""
        if direction.dim() < 2:
            return direction
        matrix = direction.flatten(1) if self.layout == "torch" else direction.flatten(0, -2)
        return newton_schulz(matrix, NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ_EPS).reshape(direction.shape)
