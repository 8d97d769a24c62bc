"""Sums of small formulas, one term after another: each is fitted to what those before it lack, and then all numbers together.

Matching pursuit (Mallat and Zhang, 1993, https://doi.org/10.1109/78.258082) with a nonlinear fit of each term. A steep part
beside a flat one is a term of its own, found at a scale of its own; evolution would have to guess both at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from metaopt.program.program import Program
from metaopt_symbolic.distill.fit import QUICK, Fit, Front, Target, polished, weighted
from metaopt_symbolic.genome import LOSS, Assign, Genome

SCALES = (1.0, 5.0, 20.0)
"""Of the first weights of inputs, in units of one by their sizes: how steep a term may begin."""

FIRSTS, SECONDS = 7, 6
"""How many sums get a further term, and how many terms each of them tries."""

TERMS = 100
"""Small formulas that serve as terms: those that match best alone."""

STEPS = 30
"""Of the fit of all numbers together."""


class _Rest:
    """What a formula lacks of a target: itself a `Target`."""

    def __init__(self, target: Target, genome: Genome) -> None:
        self._target, self.sizes = target, target.sizes
        self.wanted: NDArray[np.float64] = target.wanted - target.outputs(genome.program(), np.zeros((1, 0)))[0]

    def outputs(self, program: Program, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Target.outputs`."""
        return self._target.outputs(program, numbers)


def pursue(target: Target, starts: Sequence[Genome], front: Front, *, tolerance: float, more: int = 2) -> None:
    """Add sums of small formulas to a front.

    Args:
        target: to match.
        starts: small formulas of a loss.
        front: gets all sums that are fitted.
        tolerance: error at which no further term is needed.
        more: terms that are added to the first one, at most.
    """
    moved = [_moved(genome) for genome in starts]
    alone = [min((polished(target, weighted(g, sizes), QUICK) for sizes in _sizes(target)), key=_error) for g in moved]
    order = np.argsort([fit.error for fit in alone], kind="stable")
    terms, sums = [moved[k] for k in order[:TERMS]], [alone[k] for k in order]
    for _ in range(more):
        found = []
        for first in _distinct(sums)[:FIRSTS]:
            rest = _Rest(target, first.genome)
            seconds = [polished(rest, weighted(g, sizes), QUICK) for g in terms for sizes in _sizes(target)]
            for second in sorted(seconds, key=_error)[:SECONDS]:
                found.append(polished(target, _sum(first.genome, second.genome), STEPS))
                front.add(found[-1])
        sums = sorted(found, key=_error)
        if front.best.error <= tolerance:
            return


def _error(fit: Fit) -> float:
    return fit.error


def _sizes(target: Target) -> list[Mapping[str, float]]:
    return [{name: size / scale for name, size in target.sizes.items()} for scale in SCALES]


def _moved(genome: Genome) -> Genome:
    """A small formula whose functions may be anywhere: f(w x + b) in the place of f(w x)."""
    body: list[Assign] = []
    for a in genome.body:
        if a.function not in ("add", "sub", "mul") and a.args[0] in genome.tensors:
            body.append(Assign(f"moved_{len(body)}", "add", (a.args[0], 0.0)))
            a = a._replace(args=(body[-1].target,))
        body.append(a)
    return dataclasses.replace(genome, body=tuple(body))


def _distinct(fits: Sequence[Fit]) -> list[Fit]:
    """Those with errors of their own: many formulas are the same function."""
    return [*{f"{fit.error:.3g}": fit for fit in reversed(fits)}.values()][::-1]


def _sum(one: Genome, two: Genome) -> Genome:
    """The sum of two losses of the same inputs."""
    halves = [_named(genome, name) for genome, name in ((one, "a"), (two, "b"))]
    return dataclasses.replace(
        one, body=(*halves[0], *halves[1], Assign(LOSS, "add", (halves[0][-1].target, halves[1][-1].target)))
    )


def _named(genome: Genome, name: str) -> list[Assign]:
    """The assignments of a loss with ``name`` before their variables."""
    own = {a.target for a in genome.body}
    return [
        Assign(
            name + target, function, tuple(name + arg if isinstance(arg, str) and arg in own else arg for arg in args)
        )
        for target, function, args in genome.body
    ]
