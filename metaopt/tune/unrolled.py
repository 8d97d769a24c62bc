"""Methods that differentiate the training run in reverse.

With ``a_T = dF/ds_T``, for t = T-1 down to 0: ``h += a_{t+1} dstep/dl``, ``a_t = a_{t+1} dstep/ds``; then
``dF/dl = d outer/dl + h + a_0 dstart/dl`` (Franceschi et al. 2017, equations 13 to 15).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from metaopt import tree
from metaopt.rule import State
from metaopt.space import option
from metaopt.tree import Tree
from metaopt.tune.derivatives import add, norm, vjp
from metaopt.tune.hypergradient import Cost, Facts, Hypergradient, Method, Outer
from metaopt.tune.inner import Hypers, Inner, scalar
from metaopt.tune.inverse import refuse_start_hypers


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
        unused: set[str] = set()
        found = _differentiated(inner, outer, hypers, lambda _: state, first, unused)
        refuse_start_hypers(inner, hypers, unused)
        return found

    def cost(self, facts: Facts) -> Cost:
        """Training, and the graphs of the window."""
        window = min(self.window, facts.steps)
        return Cost(facts.steps + 1.5 * window, window * (facts.step_bytes + facts.state_bytes))


def _differentiated(
    inner: Inner,
    outer: Outer,
    hypers: Hypers,
    start: Callable[[Hypers], State],
    first: int,
    unused: set[str] | None = None,
) -> Hypergradient:
    def run(h: Hypers) -> tuple[Tensor, State]:
        state = inner.advance(start(h), h, first, inner.steps)
        return scalar(outer(inner.params(state), h)), state

    (value, state), pull = vjp(run, hypers, names=["hypers"], has_aux=True, proven=unused)
    (grads,) = pull(torch.ones_like(value))
    return Hypergradient(value, grads, inner.params(state), state)


class _Adjoint:
    """dF/ds_t and what has gathered of dF/dl, going backwards from the end of the run, which is the first to be given.

    Attributes:
        value: F.
        final: the state at the end of the run.
        state: cotangent of the current state, of its floating-point leaves.
        hypers: gathered so far.
        norms: of the former, from t = T on.
    """

    value: Tensor
    final: State
    state: Tree
    hypers: Hypers

    def __init__(self, inner: Inner, outer: Outer, hypers: Hypers) -> None:
        self.inner, self.outer, self.at = inner, outer, hypers
        self.norms: list[Tensor] = []
        self._unused: set[str] = set()

    def through(self, state: State, first: int, last: int) -> None:
        """Back over steps ``first`` to ``last``, which began in ``state``."""
        if first == 0:
            self._unused.clear()  # what no later step used, the first may
        if self.inner.vjp is not None and last == first + 1:
            if not self.norms:
                self._begin(self.inner.step(state, self.at, first))
            self._gather(*self.inner.vjp(state, self.at, first, self.state))
            return
        after, pull = vjp(
            lambda s, h: self.inner.advance(s, h, first, last), state, self.at, names=["state", "hypers"],
            proven=self._unused,
        )  # fmt: skip
        if not self.norms:
            self._begin(after)
        self._gather(*pull(self.state))

    def _begin(self, final: State) -> None:
        """Back over the outer objective."""
        self.value, pull = vjp(
            lambda s, h: scalar(self.outer(self.inner.params(s), h)), final, self.at, names=["state", "hypers"],
            second_order=False,
        )  # fmt: skip
        self.final, (self.state, self.hypers) = final, pull(torch.ones_like(self.value))
        self.norms.append(norm(self.state))

    def _gather(self, state: Tree, hypers: Hypers) -> None:
        self.state = state
        self.hypers = add(self.hypers, hypers)
        self.norms.append(norm(state))

    def result(self) -> Hypergradient:
        """Back over the start of the run; what has been found."""
        _, pull = vjp(self.inner.start, self.at, names=["hypers"], second_order=False)
        grads = add(self.hypers, *pull(self.state))
        diagnostics = {"adjoint_norms": torch.stack(self.norms)}
        return Hypergradient(self.value, grads, self.inner.params(self.final), self.final, diagnostics)


class Checkpoint(Method):
    """The graph of one segment of sqrt(T) steps at a time, from states kept at their beginnings: exact.

    Memory sqrt(T) (2 S + M); time 3.5 to 4 times that of training (Chen et al. 2016).
    """

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, keeping the beginnings of segments; then segment after segment backwards."""
        segments = math.isqrt(max(inner.steps, 1))
        return _replayed(inner, outer, hypers, max(math.ceil(inner.steps / segments), 1), segments, 2)

    def cost(self, facts: Facts) -> Cost:
        """Training twice."""
        segment = math.sqrt(facts.steps)
        return Cost(3.5 * facts.steps, segment * (facts.step_bytes + 2 * facts.state_bytes))


class Replay(Method):
    """The adjoint a few steps at a time, of states that are recomputed from a tree of checkpoints: exact, O(log T) of memory.

    A graph spans ``graph`` steps; at most ``states`` states between graphs are held, and ``branching`` on each level above. A
    run of T steps needs ``log_branching(T / (graph states))`` levels, each of which repeats the training once (Engstrom et
    al. 2025, section 3, whose tree this is, with graphs of one step). Where `Inner.vjp` gives a step's adjoint no graph is
    made: compiled steps and kernels take part.
    """

    states: int = option(128, low=1, doc="states held between consecutive graphs")
    branching: int = option(8, low=2, doc="checkpoints per level above")
    graph: int = option(16, low=1, doc="steps per graph; 1 is leanest where a graph is much larger than a state")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, keeping checkpoints; then graph after graph backwards."""
        return _replayed(inner, outer, hypers, self.graph if inner.vjp is None else 1, self.states, self.branching)

    def cost(self, facts: Facts) -> Cost:
        """Training once more per level."""
        graphs = math.ceil(max(facts.steps, 1) / self.graph)
        levels = math.ceil(max(math.log(graphs / self.states, self.branching), 0))
        kept = min(self.states, graphs) + self.branching * levels
        graph = min(self.graph, facts.steps) * (facts.step_bytes + facts.state_bytes)
        return Cost((3.5 + levels) * facts.steps, kept * facts.state_bytes + graph)


def _replayed(inner: Inner, outer: Outer, hypers: Hypers, graph: int, states: int, branching: int) -> Hypergradient:
    """Training, and back through graphs of at most ``graph`` steps; see `Replay`."""
    adjoint = _Adjoint(inner, outer, hypers)

    def back(state: State, first: int, last: int) -> None:
        graphs = math.ceil((last - first) / graph)
        if graphs <= 1:
            adjoint.through(state, first, last)
            return
        count = graphs if graphs <= states else min(branching, graphs)
        kept = []
        for start, end in itertools.pairwise(first + (last - first) * i // count for i in range(count + 1)):
            kept.append((state, start, end))
            if end < last:
                state = inner.advance(state, hypers, start, end)
        while kept:
            back(*kept.pop())

    back(inner.start(hypers), 0, inner.steps)
    return adjoint.result()
