"""Evolution strategies: hypergradients from values alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from metaopt.random import normal
from metaopt.rule import State
from metaopt.space import hyper, option
from metaopt.tune.derivatives import flattened
from metaopt.tune.hypergradient import Cost, Facts, Hypergradient, Method, Outer
from metaopt.tune.inner import Hypers, Inner, scalar


class Evolution(Method):
    """``dF/dl = 1 / (2 N sigma) sum_i (F(l + sigma e_i) - F(l - sigma e_i)) e_i`` with standard normal e_i.

    Antithetic evolution strategies (Salimans et al. 2017): unbiased for the gradient of F smoothed by a normal of standard
    deviation ``sigma``; the squared error is about H / N of the squared gradient. 2 N runs, no derivatives: for steps without
    any, and for chaotic runs, whose gradient explodes. ``copies`` runs go at a time under ``vmap``; 1 runs them one by one,
    whatever they are made of.
    """

    needs: ClassVar[tuple[str, ...]] = ("values",)

    pairs: int = option(8, low=1, doc="N")
    sigma: float = hyper(0.01, 0.0, open_low=True, scale="log", doc="of the perturbations")
    copies: int = option(1, low=1, doc="runs at a time")
    seed: int = option(0, low=0, doc="of the perturbations; an outer loop adds its step")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train at the hypers and around them."""
        point, put_back = flattened(hypers)

        def train(flat: Tensor) -> tuple[Tensor, State]:
            h = put_back(flat)
            state = inner.advance(inner.start(h), h, 0, inner.steps)
            return scalar(outer(inner.params(state), h)), state

        value, state = train(point)
        key = torch.tensor(self.seed, device=point.device)
        noise = normal(key, (self.pairs, len(point)), dtype=point.dtype)
        points = point + self.sigma * torch.cat([noise, -noise])
        if self.copies == 1:
            values = torch.stack([train(flat)[0] for flat in points])
        else:
            values = torch.vmap(lambda flat: train(flat)[0], chunk_size=self.copies)(points)
        ahead, behind = values.chunk(2)
        grads = put_back((ahead - behind).to(noise.dtype) @ noise / (2 * self.pairs * self.sigma))
        return Hypergradient(value, grads, inner.params(state), state)

    def cost(self, facts: Facts) -> Cost:
        """Runs."""
        return Cost((1 + 2 * self.pairs) * facts.steps, 2 * self.copies * facts.state_bytes)
