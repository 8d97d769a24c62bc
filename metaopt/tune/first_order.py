"""Methods that need no second derivatives of the inner loss: compiled losses, fused kernels and flash attention take part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from metaopt import tree
from metaopt.rule import Params, State
from metaopt.space import hyper, option
from metaopt.tune.derivatives import add, norm, vjp
from metaopt.tune.hypergradient import Cost, Facts, Hypergradient, Method, Outer, inner_gradients
from metaopt.tune.inner import Hypers, Inner, scalar
from metaopt.tune.inverse import refuse_optimizer_hypers


class Darts(Method):
    """``dF/dl = d outer/dl - (dg/dl(w + e q) - dg/dl(w - e q)) / 2e`` with ``q = scale * d outer/dw``, ``e = radius / |q|``.

    The hypergradient of one step of gradient descent with rate ``scale`` (Liu et al. 2019, equation 8), as if the Hessian of g
    were the identity over ``scale``: biased. Two inner gradients; their difference errs by O(radius^2).
    """

    needs: ClassVar[tuple[str, ...]] = ("first", "loss")

    scale: float = hyper(1.0, 0.0, open_low=True, doc="learning rate of the step")
    radius: float = hyper(0.01, 0.0, open_low=True, scale="log", doc="length of the finite difference")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, then differ."""
        state = inner.advance(inner.start(hypers), hypers, 0, inner.steps)
        params = inner.params(state)
        value, right, direct = outer_gradients(outer, params, hypers)
        q = self.direction(inner, state, hypers, right)
        size = norm(q)
        reach = self.radius / torch.where(size > 0, size, 1)
        unused: set[str] = set()
        ahead, behind = (loss_by_hypers(inner, add(params, q, sign * reach), hypers, unused) for sign in (1, -1))
        refuse_optimizer_hypers(inner, state, hypers, unused)
        grads = tree.map_tree(lambda d, a, b: d - (a - b) / (2 * reach), direct, ahead, behind)
        return Hypergradient(value, grads, params, state)

    def direction(self, inner: Inner, state: State, hypers: Hypers, right: Params) -> Params:
        """q, from ``right`` = d outer/dw."""
        return tree.map_tree(lambda leaf: self.scale * leaf, right)

    def cost(self, facts: Facts) -> Cost:
        """Training and two gradients."""
        return Cost(facts.steps + 4, facts.step_bytes + 4 * facts.params_bytes)


class Sama(Darts):
    """`Darts` with ``q = -(dw'/dgrad)' d outer/dw`` of the optimizer's own update w' at the last state.

    Choe et al. 2023, equation 4. For SGD that is its learning rate times d outer/dw; for Adam it has the scale of each
    coordinate, with bias corrections. ``scale`` multiplies it.
    """

    needs: ClassVar[tuple[str, ...]] = ("first", "loss", "split")

    def direction(self, inner: Inner, state: State, hypers: Hypers, right: Params) -> Params:
        """By the adjoint of the update alone."""
        gradients, update = inner.gradients, inner.update
        assert gradients is not None and update is not None
        at = max(inner.steps - 1, 0)
        grads = gradients(state, hypers, at)
        _, pull = vjp(
            lambda g: inner.params(update(g, state, hypers, at)), grads, names=["gradients"], second_order=False
        )
        (through,) = pull(right)
        return tree.map_tree(lambda leaf: -self.scale * leaf, through)


class Penalty(Method):
    """``dF/dl = d outer/dl(y_s) + s (dg/dl(y_s) - dg/dl(y))``, y minimising g and y_s minimising ``outer / s + g``.

    The gradient of the value function's penalty (Kwon et al. 2023, F2SA, equation 4): bias O(1/s) where g is strongly convex
    and both runs have converged, and s times the distance from that elsewhere. Both go on from the trained parameters for
    ``steps`` updates of the rule at its last step, on the loss of all inner data. Gradients only.
    """

    needs: ClassVar[tuple[str, ...]] = ("first", "loss", "split")

    strength: float = hyper(10.0, 0.0, open_low=True, scale="log", doc="s")
    steps: int = option(100, low=1, doc="further updates of y and of y_s")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, then go on with and without the outer objective."""
        state = inner.advance(inner.start(hypers), hypers, 0, inner.steps)
        params = inner.params(state)
        unused: set[str] = set()
        loss_by_hypers(inner, params, hypers, unused)
        refuse_optimizer_hypers(inner, state, hypers, unused)  # before the two runs
        plain, tilted = (self._go_on(inner, outer, hypers, state, tilt) for tilt in (0.0, 1 / self.strength))
        _, right, direct = outer_gradients(outer, tilted, hypers)
        difference = add(loss_by_hypers(inner, tilted, hypers), loss_by_hypers(inner, plain, hypers), -1.0)
        # how far y_s is from stationary, as g's own gradient shows it: s times this is what its error can do
        residual = norm(add(inner_gradients(inner, tilted, hypers), right, 1 / self.strength))
        grads = add(direct, difference, self.strength)
        return Hypergradient(scalar(outer(params, hypers)), grads, params, state, {"residual": residual})

    def _go_on(self, inner: Inner, outer: Outer, hypers: Hypers, state: State, tilt: float) -> Params:
        update = inner.update
        assert update is not None
        at = max(inner.steps - 1, 0)
        for _ in range(self.steps):
            grads = inner_gradients(inner, inner.params(state), hypers)
            if tilt:
                grads = add(grads, outer_gradients(outer, inner.params(state), hypers)[1], tilt)
            state = update(grads, state, hypers, at)
        return inner.params(state)

    def cost(self, facts: Facts) -> Cost:
        """Training and two further runs."""
        return Cost(facts.steps + 2.5 * self.steps + 4, facts.step_bytes + 2 * facts.state_bytes)


def outer_gradients(outer: Outer, params: Params, hypers: Hypers) -> tuple[Tensor, Params, Hypers]:
    """The outer value, and its direct derivatives in params and hypers."""
    value, pull = vjp(lambda w, h: scalar(outer(w, h)), params, hypers, names=["params", "hypers"], second_order=False)
    return value, *pull(torch.ones_like(value))


def loss_by_hypers(inner: Inner, params: Params, hypers: Hypers, unused: set[str] | None = None) -> Hypers:
    """dg/dl of the inner loss of all data; ``unused`` gets the names of the hypers that it does not use."""
    loss = inner.loss
    assert loss is not None
    value, pull = vjp(lambda h: loss(params, h), hypers, names=["hypers"], second_order=False, proven=unused)
    return pull(torch.ones_like(value))[0]
