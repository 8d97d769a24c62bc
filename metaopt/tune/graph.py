r"""Problems above problems: each level answers with its optimum to the levels above it, and foresees those below.

With three levels, bottom first,

.. math::
    w_1^*(w_2, w_3) = \arg\min_{w_1} f_1, \qquad
    w_2^*(w_3) = \arg\min_{w_2} f_2(w_1^*(w_2, w_3), w_2, w_3), \qquad
    \min_{w_3} f_3(w_1^*(w_2^*, w_3), w_2^*, w_3)

so the gradient of the top is the sum over the paths down of products of best-response Jacobians, as in Betty (Choe et al. 2023,
arXiv:2207.02849); but the middle level moves by its total derivative, which includes the answers from below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.rule import Params, UpdateRule
from metaopt.tune import Hypers, Inner, implicit

Values = Mapping[str, Params]
"""Name of a level -> its parameters."""


@dataclass(frozen=True)
class Level:
    """One problem of a graph.

    Attributes:
        name: by which other levels' losses find its parameters.
        loss: ``loss(values) -> scalar``, which this level minimises over its own parameters ``values[name]``; it may read those
            of the levels in ``uses``.
        start: its initial parameters.
        rule: what trains it, and
        steps: how many updates; the top level has no use for either.
        uses: names of other levels, above or below.
    """

    name: str
    loss: Callable[[Values], Tensor]
    start: Params
    rule: UpdateRule | None = None
    steps: int = 0
    uses: Sequence[str] = ()


class Graph:
    """Levels that depend on each other, bottom first; the last one is the outer problem.

    A level is solved as often as one above it that foresees it takes a step, so costs multiply along a path; levels that do
    not use each other are solved once.

    Args:
        levels: with the top level last.
        optima: whether the answers of all levels but the highest one below the top are differentiated as optima, by
            `metaopt.tune.implicit`, which forgets their runs; else through their steps, which is exact for runs of any length
            and takes the memory of all of them. (The highest is differentiated by the method of the hypergradient.)

    Raises:
        ValueError: two levels of one name, a name in ``uses`` that no level has, or a level below the top without a rule.
    """

    def __init__(self, levels: Sequence[Level], *, optima: bool = False) -> None:
        self._optima = optima
        self._levels = {level.name: level for level in levels}
        if len(self._levels) < max(len(levels), 2):
            raise ValueError(f"a graph needs two levels or more of different names, got {[x.name for x in levels]}")
        *below, self.top = levels
        for level in levels:
            for name in level.uses:
                if name not in self._levels or name == level.name:
                    raise ValueError(f"level {level.name!r} uses {name!r}, which is no other level of this graph")
        for level in below:
            if level.rule is None or level.steps < 1:
                raise ValueError(f"level {level.name!r} is below the top, so it needs a rule and at least one step")
        self._depth = {name: i for i, name in enumerate(self._levels)}

    def inner(self) -> Inner:
        """All levels below the top as one inner problem, whose hypers are the top level's parameters.

        Its parameters are those of the highest level that the top depends on; `outer` finds the others.
        """
        return self._inner(self._highest)

    def outer(self, params: Params, hypers: Hypers) -> Tensor:
        """The top level's loss after the levels below have answered to ``hypers``."""
        values = {self.top.name: hypers, self._highest.name: params}
        return self.top.loss(self.responses(self.top.uses, values, self.top))

    def responses(self, wanted: Iterable[str], fixed: Values, level: Level) -> Values:
        """``fixed``, and the best responses to it of the levels below ``level`` that are wanted, or used by such."""
        needed: set[str] = set()
        queue = list(wanted)
        while queue:
            name = queue.pop()
            if name not in needed and self._depth[name] < self._depth[level.name]:
                needed.add(name)
                queue += self._levels[name].uses
        values = dict(fixed)
        for name in sorted(needed - set(fixed), key=self._depth.__getitem__, reverse=True):
            values[name] = self._solution(self._levels[name], values)
        return values

    @property
    def _highest(self) -> Level:
        """Of the levels below the top."""
        return list(self._levels.values())[-2]

    def _inner(self, level: Level, above: Values | None = None) -> Inner:
        """The run of one level; ``above``: what is given, else the hypers are the top level's parameters."""
        assert level.rule is not None  # it is below the top

        def total(params: Params, hypers: Hypers, batch: None) -> Tensor:
            return self._total(level, params, {self.top.name: hypers} if above is None else above)

        return Inner.of_rule(total, level.rule, level.start, level.steps)

    def _total(self, level: Level, params: Params, above: Values) -> Tensor:
        """The loss of a level with what the levels below answer."""
        return level.loss(self.responses(level.uses, {**above, level.name: params}, level))

    def _solution(self, level: Level, above: Values) -> Params:
        """The parameters that a level's run ends with, differentiable in those above."""

        def trained(above: Values) -> Params:
            inner = self._inner(level, above)
            return inner.params(inner.advance(inner.start({}), {}, 0, inner.steps))

        if not self._optima:
            return trained(above)
        slopes = torch.func.grad(lambda params, above: self._total(level, params, above))
        found: Params = implicit(slopes, trained)(dict(above))
        return found
