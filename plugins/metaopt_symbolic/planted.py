"""A search whose solution is known: find the rule whose updates are given.

It says whether a search can find something, apart from what training would reward. Candidates see random parameters and
gradients; their updates are compared with those of a hidden rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.program.population import PopulationStep, encode
from metaopt.program.program import Program
from metaopt_symbolic.cascade import Score
from metaopt_symbolic.genome import Genome

STEPS, SIZES = 150, (24, 8)
WORST, TINY = 10.0, 1e-30
SOLVED = 0.02
"""A relative error of the updates below which a candidate is the hidden rule, on probes that the search has not seen.

A wrong sign of one update in a hundred makes as much. The nearest other rules, with a decay whose memory is half or twice as
long, are above 0.03."""


class Planted:
    r"""Fitness is how well a candidate's updates u match those of ``hidden``, u*: 0 for the same rule, else below.

    .. math:: -\operatorname{mean}\frac{|s u - u^*|}{|s u| + |u^*|} - 0.03\,|\log s|,
        \qquad s = \operatorname{median} |u^*| / |u|

    over elements, steps and probes. Elements count alike, however small their gradients; and a rule that is right but for its
    learning rate is nearly right.

    Parameters and gradients spread over orders of magnitude. Gradients are means that drift, in ten steps or hardly at all, and
    noise, which is far above or far below them: so that averages of every length show.

    Args:
        hidden: any genome with the scalars ``lr`` and ``t``, or ``lr`` alone.
        probes: how many sequences of gradients.
        seed: of the probes.
    """

    def __init__(self, hidden: Genome, probes: int = 2, seed: int = 0) -> None:
        self._probes, self._seed = probes, seed
        (self._wanted,) = self._updates([hidden.program()])

    def scores(self, programs: Sequence[Program]) -> list[Score]:
        """One score per program; -inf for updates that are no numbers."""
        if not programs:
            return []
        updates = self._updates(programs)
        ratios = ((self._wanted.abs() + TINY) / (updates.abs() + TINY)).log()
        scale = ratios.flatten(1).median(1).values
        distances = self._mismatch(updates * scale.exp()[:, None, None, None]) + 0.03 * scale.abs().clamp_max(WORST)
        return [
            Score(-d if math.isfinite(d) else -math.inf, 0, {"updates": d}, 1.0, 0.0, STEPS) for d in distances.tolist()
        ]

    def _mismatch(self, updates: Tensor) -> Tensor:
        """[N], in [0, 1]."""
        return ((updates - self._wanted).abs() / (updates.abs() + self._wanted.abs() + TINY)).mean((1, 2, 3))

    def error(self, program: Program) -> float:
        """The mean relative difference ``2 |u - u*| / (|u| + |u*|)``, in [0, 2]; inf for updates that are no numbers."""
        error = 2 * float(self._mismatch(self._updates([program])))
        return error if math.isfinite(error) else math.inf

    def _updates(self, programs: Sequence[Program]) -> Tensor:
        """float64 [N, steps, probes, elements]."""
        count, probes, elements = len(programs), self._probes, sum(SIZES)
        generator = torch.Generator().manual_seed(self._seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        params = 10 ** normal(probes, elements) * normal(probes, elements)
        scales = 10 ** (1.5 * normal(probes, elements) - 1)
        keep = torch.exp(-(10 ** (-1 - 2 * torch.rand(probes, elements, generator=generator, dtype=torch.float64))))
        means = [normal(probes, elements)]
        for _ in range(STEPS - 1):
            means.append(keep * means[-1] + (1 - keep**2).sqrt() * normal(probes, elements))
        ratio = 10 ** (0.7 * normal(probes, elements) + 0.3)
        grads = scales * (ratio * torch.stack(means) + normal(STEPS, probes, elements))
        times = {
            "lr": torch.linspace(1, 0.2, STEPS, dtype=torch.float64)[None],
            "t": torch.arange(1.0, STEPS + 1, dtype=torch.float64)[None],
        }
        runs = torch.arange(count).repeat_interleave(probes)
        # the same parameters at every step: what weight decay adds does not hang on what came before
        updates = updates_along(programs, runs, params.expand(STEPS, -1, -1), grads, times, SIZES)
        return updates.unflatten(1, (count, probes)).transpose(0, 1)

    def state(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered."""


def updates_along(
    programs: Sequence[Program],
    runs: Tensor,
    params: Tensor,
    grads: Tensor,
    times: Mapping[str, Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """What optimizers subtract, when at every step they see given parameters and gradients, in float64.

    Args:
        programs: of them.
        runs: int64 [R], the program of each run; R is a multiple C P of the number of sequences, which C times P runs see.
        params: float64 [T, P, elements].
        grads: the same.
        times: the programs' scalars, as `metaopt.program.population.Population.numbers` takes them.
        sizes: of the tensors that make up the elements.

    Returns:
        [T, R, elements].
    """
    population = encode(programs)
    step = PopulationStep(population, runs, sizes)
    numbers = population.numbers(runs, times, torch.float64).expand(len(grads), -1, -1)
    copies = len(runs) // grads.shape[1]
    slots = torch.zeros(population.kernel.inputs - 2, len(runs), grads.shape[2], dtype=torch.float64)
    after = params.repeat(1, copies, 1)
    for k, grad in enumerate(grads):
        step(after[k], grad.repeat(copies, 1), slots, numbers[k])
    return params.repeat(1, copies, 1) - after
