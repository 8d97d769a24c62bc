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

STEPS, SIZES = 12, (24, 8)
WORST = 10.0
SOLVED = 0.02
"""A relative error of the updates below which a candidate is the hidden rule, on probes that the search has not seen."""


class Planted:
    r"""Fitness is how well a candidate's updates u match those of ``hidden``, u*: 0 for the same rule, else below.

    .. math:: -\operatorname{mean}\frac{|s u - u^*|}{|s u| + |u^*|} - 0.03\,|\log s|,
        \qquad s = \operatorname{median} |u^*| / |u|

    over elements, steps and probes, with an s for each step. Elements count alike, however small their gradients; and a rule
    that is right but for its learning rate is nearly right.

    Args:
        hidden: any genome with the scalars ``lr`` and ``t``, or ``lr`` alone.
        probes: how many sequences of gradients.
        seed: of the probes.
    """

    def __init__(self, hidden: Genome, probes: int = 4, seed: int = 0) -> None:
        self._probes, self._seed = probes, seed
        (self._wanted,) = self._updates([hidden.program()])

    def scores(self, programs: Sequence[Program]) -> list[Score]:
        """One score per program; -inf for updates that are no numbers."""
        found = []
        for updates in self._updates(programs) if programs else ():
            fitness = -float(self._distances(updates).mean())
            found.append(
                Score(fitness if math.isfinite(fitness) else -math.inf, 0, {"updates": -fitness}, 1.0, 0.0, STEPS)
            )
        return found

    def _distances(self, updates: Tensor) -> Tensor:
        """[steps, probes]."""
        wanted, tiny = self._wanted, 1e-30
        scale = ((wanted.abs() + tiny) / (updates.abs() + tiny)).log().median(-1, keepdim=True).values
        scaled = updates * scale.exp()
        mismatch = ((scaled - wanted).abs() / (scaled.abs() + wanted.abs() + tiny)).mean(-1)
        return mismatch + 0.03 * scale.squeeze(-1).abs().clamp_max(WORST)

    def error(self, program: Program) -> float:
        """The largest relative error of the updates of a step; inf for updates that are no numbers."""
        (updates,) = self._updates([program])
        errors = (updates - self._wanted).norm(dim=-1) / self._wanted.norm(dim=-1)
        return float(errors.max()) if bool(errors.isfinite().all()) else math.inf

    def _updates(self, programs: Sequence[Program]) -> Tensor:
        """float64 [N, steps, probes, elements]."""
        count, probes, elements = len(programs), self._probes, sum(SIZES)
        generator = torch.Generator().manual_seed(self._seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        params = normal(probes, elements)
        scales = 10 ** (1.5 * normal(probes, elements) - 1)
        mean = 10 ** (0.7 * normal(probes, elements) - 0.3) * normal(probes, elements).sign()
        grads = scales * (mean + normal(STEPS, probes, elements))  # some elements are all noise, some hardly have any
        rates = torch.linspace(1, 0.2, STEPS, dtype=torch.float64)
        population = encode(programs)
        runs = torch.arange(count).repeat_interleave(probes)
        step = PopulationStep(population, runs, SIZES)
        times = {"lr": rates[None], "t": torch.arange(1.0, STEPS + 1, dtype=torch.float64)[None]}
        numbers = population.numbers(runs, times, torch.float64).expand(STEPS, -1, -1)
        slots = torch.zeros(population.kernel.inputs - 2, len(runs), elements, dtype=torch.float64)
        updates = torch.empty(STEPS, len(runs), elements, dtype=torch.float64)
        for k in range(STEPS):
            # the same parameters at every step: what weight decay adds does not hang on what came before
            updates[k] = params.repeat(count, 1)
            step(updates[k], grads[k].repeat(count, 1), slots, numbers[k])
        updates = params.repeat(count, 1) - updates
        return updates.unflatten(1, (count, probes)).transpose(0, 1)

    def state(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered."""
