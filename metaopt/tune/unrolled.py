"""Methods that differentiate the training run in reverse.

With ``a_T = dF/ds_T``, for t = T-1 down to 0: ``h += a_{t+1} dstep/dl``, ``a_t = a_{t+1} dstep/ds``; then
``dF/dl = d outer/dl + h + a_0 dstart/dl`` (Franceschi et al. 2017, equations 13 to 15).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.rule import State
from metaopt.space import option
from metaopt.tree import Tree
from metaopt.tune.derivatives import add, norm, vjp
from metaopt.tune.hypergradient import Cost, Facts, Hypergradient, Method, Outer, scalar
from metaopt.tune.inner import Hypers, Inner


class Unroll(Method):
    """One autograd graph of the whole run: exact, fastest, T (S + M) of memory.

    S: bytes of a state; M: of what autograd keeps of a step. Time 2.5 to 3 times that of training.
    """

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Reverse mode through all steps."""
        return _differentiated(inner, outer, hypers, inner.start, 0)

    def cost(self, facts: Facts) -> Cost:
        """T graphs of a step."""
        return Cost(2.5 * facts.steps, facts.steps * (facts.step_bytes + facts.state_bytes))


class Truncated(Method):
    """The last ``window`` steps, as if what comes before did not depend on the hypers.

    Where the inner loss is a-strongly convex and L-smooth and SGD's learning rate e is at most 1/L, the bias is at most
    ``(1 - e a)^window / (e a)`` times the norms of d outer/dw and of dstep/dl (Shaban et al. 2019, proposition 3.1). Memory
    window (S + M).
    """

    window: int = option(10, low=1, doc="steps differentiated")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, then differentiate the end."""
        first = max(inner.steps - self.window, 0)
        if first == 0:
            return _differentiated(inner, outer, hypers, inner.start, 0)
        state = tree.detach(inner.advance(inner.start(hypers), hypers, 0, first))
        return _differentiated(inner, outer, hypers, lambda _: state, first)

    def cost(self, facts: Facts) -> Cost:
        """Training, and the graphs of the window."""
        window = min(self.window, facts.steps)
        return Cost(facts.steps + 1.5 * window, window * (facts.step_bytes + facts.state_bytes))


def _differentiated(
    inner: Inner, outer: Outer, hypers: Hypers, start: Callable[[Hypers], State], first: int
) -> Hypergradient:
    def run(h: Hypers) -> tuple[Tensor, State]:
        state = inner.advance(start(h), h, first, inner.steps)
        return scalar(outer(inner.params(state), h)), state

    (value, state), pull = vjp(run, hypers, names=["hypers"], has_aux=True)
    (grads,) = pull(torch.ones_like(value))
    return Hypergradient(value, grads, inner.params(state), state)


class _Adjoint:
    """dF/ds_t and what has gathered of dF/dl, going backwards from the end of the run.

    Attributes:
        value: F.
        state: cotangent of the current state, of its floating-point leaves.
        hypers: gathered so far.
        norms: of the former, from t = T on.
    """

    def __init__(self, inner: Inner, outer: Outer, hypers: Hypers, state: State) -> None:
        self.inner, self.at = inner, hypers
        self.value, pull = vjp(
            lambda s, h: scalar(outer(inner.params(s), h)), state, hypers, names=["state", "hypers"], second_order=False
        )
        self.state, self.hypers = pull(torch.ones_like(self.value))
        self.norms = [norm(self.state)]
        self._unused: set[str] = set()

    def through(self, state: State, first: int, last: int) -> None:
        """Back over steps ``first`` to ``last``, which began in ``state``."""
        if first == 0:
            self._unused.clear()  # what no later step used, the first may
        if self.inner.vjp is not None and last == first + 1:
            self._gather(*self.inner.vjp(state, self.at, first, self.state))
            return
        _, pull = vjp(
            lambda s, h: self.inner.advance(s, h, first, last), state, self.at, names=["state", "hypers"],
            proven=self._unused,
        )  # fmt: skip
        self._gather(*pull(self.state))

    def start(self) -> None:
        """Back over the start of the run."""
        _, pull = vjp(self.inner.start, self.at, names=["hypers"], second_order=False)
        self._gather({}, *pull(self.state))

    def _gather(self, state: Tree, hypers: Hypers) -> None:
        self.state = state
        self.hypers = add(self.hypers, hypers)
        self.norms.append(norm(state))

    def result(self, state: State) -> Hypergradient:
        """What has been found, of a run that ended in ``state``."""
        curve = torch.stack(self.norms[:-1])
        return Hypergradient(self.value, self.hypers, self.inner.params(state), state, {"adjoint_norms": curve})


class Checkpoint(Method):
    """The graph of one segment of sqrt(T) steps at a time, from states kept at their beginnings: exact.

    Memory sqrt(T) (2 S + M); time 3.5 to 4 times that of training (Chen et al. 2016).
    """

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, keeping the beginnings of segments; then segment after segment backwards."""
        kept, state = _forward(inner, inner.start(hypers), hypers, _pieces(0, inner.steps, math.isqrt(inner.steps)))
        adjoint = _Adjoint(inner, outer, hypers, state)
        while kept:
            adjoint.through(*kept.pop())
        adjoint.start()
        return adjoint.result(state)

    def cost(self, facts: Facts) -> Cost:
        """Training twice."""
        segment = math.sqrt(facts.steps)
        return Cost(3.5 * facts.steps, segment * (facts.step_bytes + 2 * facts.state_bytes))


class Replay(Method):
    """The adjoint one step at a time, of states that are recomputed from a tree of checkpoints: exact, O(log T) of memory.

    At most ``states`` consecutive states are held, and ``branching`` on each level above: a run of T steps needs
    ``log_branching(T / states)`` levels, each of which repeats the training once (Engstrom et al. 2025, section 3, whose tree
    this is). A graph never spans more than one step, and none is made where `Inner.vjp` gives a step's adjoint: compiled steps
    and kernels take part.
    """

    states: int = option(128, low=1, doc="consecutive states held at once")
    branching: int = option(8, low=2, doc="checkpoints per level above")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, keeping checkpoints; then step after step backwards."""
        kept, state = _forward(inner, inner.start(hypers), hypers, self._split(0, inner.steps))
        adjoint = _Adjoint(inner, outer, hypers, state)
        while kept:
            self._back(adjoint, *kept.pop())
        adjoint.start()
        return adjoint.result(state)

    def _split(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        return _pieces(first, last, last - first if last - first <= self.states else self.branching)

    def _back(self, adjoint: _Adjoint, state: State, first: int, last: int) -> None:
        if last == first + 1:
            adjoint.through(state, first, last)
            return
        *before, final = self._split(first, last)
        kept, state = _forward(adjoint.inner, state, adjoint.at, before)
        kept.append((state, *final))
        while kept:
            self._back(adjoint, *kept.pop())

    def cost(self, facts: Facts) -> Cost:
        """Training once more per level."""
        levels = math.ceil(max(math.log(max(facts.steps, 1) / self.states, self.branching), 0))
        kept = min(self.states, facts.steps) + self.branching * levels
        return Cost((3.5 + levels) * facts.steps, kept * facts.state_bytes + facts.step_bytes)


def _pieces(first: int, last: int, count: int) -> Iterator[tuple[int, int]]:
    """``count`` intervals of nearly one length that make up steps ``first`` to ``last``."""
    ends = [first + (last - first) * i // max(count, 1) for i in range(count + 1)]
    return itertools.pairwise(ends)


def _forward(inner: Inner, state: State, hypers: Hypers, pieces: Any) -> tuple[list[tuple[State, int, int]], State]:
    """The state before each piece, with its steps; and the state after the last."""
    kept = []
    for first, last in pieces:
        kept.append((state, first, last))
        state = inner.advance(state, hypers, first, last)
    return kept, state
