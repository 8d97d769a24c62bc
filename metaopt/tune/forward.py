"""Forward mode: tangents of the hypers along the run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from metaopt import tree
from metaopt.rule import State
from metaopt.space import option
from metaopt.tune.derivatives import flattened, refuse_lost_tangents, vanish
from metaopt.tune.hypergradient import Cost, Facts, Hypergradient, Method, Outer
from metaopt.tune.inner import Hypers, Inner, scalar


class Forward(Method):
    """``Z_{t+1} = dstep/ds Z_t + dstep/dl``, ``dF/dl = d outer/dl + Z_T' d outer/ds``.

    Franceschi et al. 2017, equations 16 to 18. Exact; memory H S whatever T, time that of about 2 H runs: for few hypers (a
    learning rate, momentum, the shape of a schedule). Needs forward derivatives of the loss's gradient. ``chunk`` tangents go
    along at a time.
    """

    needs: ClassVar[tuple[str, ...]] = ("second", "forward")

    chunk: int = option(16, low=1, doc="tangents at a time")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Push the unit vectors of the hypers through the run."""
        point, put_back = flattened(hypers)

        def whole(h: Hypers) -> tuple[Tensor, State]:
            state = inner.advance(inner.start(h), h, 0, inner.steps)
            return scalar(outer(inner.params(state), h)), state

        def slope(direction: Tensor) -> Tensor:
            return torch.func.jvp(lambda flat: whole(put_back(flat))[0], (point,), (direction,))[1]

        value, state = whole(hypers)
        units = torch.eye(len(point), dtype=point.dtype, device=point.device)
        with torch.enable_grad():  # nothing is recorded, but square roots then have a derivative at zero
            slopes = torch.vmap(slope, chunk_size=self.chunk)(units)
        grads = put_back(slopes.detach())
        refuse_lost_tangents(lambda h: whole(h)[0], [hypers], ["hypers"], vanish(list(tree.leaves(grads))))
        return Hypergradient(value, grads, inner.params(state), state)

    def cost(self, facts: Facts) -> Cost:
        """A run, and one with two times the arithmetic per hyper."""
        return Cost((1 + 2 * facts.hypers) * facts.steps, min(self.chunk, facts.hypers) * 2 * facts.state_bytes)
