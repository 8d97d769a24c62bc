"""Real training runs of 500 different programs in lock-step, as a symbolic search scores them: 10,000 parameters each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from measure import Row, attempt, print_rows, seconds

from metaopt import registry
from metaopt.program.population import Population, encode
from metaopt_symbolic.analysis import analyse, without_redundant
from metaopt_symbolic.evaluate import train
from metaopt_symbolic.genome import SEEDS as STARTS
from metaopt_symbolic.genome import parse
from metaopt_symbolic.mutation import Mutation
from metaopt_symbolic.population import Genomes

PROGRAMS, SEEDS, HORIZON = 500, 4, 100
TASKS = {"digits_mlp": (104, 32), "mixtures_16d_mlp": (24, 24)}
"""Task -> widths of its hidden layers: 10,000 parameters, and what the search suite has."""


def mutants(count: int) -> Population:
    """AdamW after ten mutations, in as many structurally different ways."""
    generator, mutation = np.random.default_rng(0), Mutation()
    members = Genomes.of([parse(STARTS["adamw"])] * 4 * count)
    for _ in range(10):
        members = mutation.children(members, generator)
    _, different = np.unique(analyse(members).hashes, return_index=True)
    if len(different) < count:
        raise ValueError(f"only {len(different)} of the {len(members)} mutants differ; {count} were wanted")
    return encode([without_redundant(members[int(k)]).program() for k in different[:count]])


def speed(device: torch.device, task: str, programs: int, seeds: int, horizon: int, budget: float) -> Row:
    """Steps of one run per second, losses and gradients included."""
    made = registry.create("task", task, hidden=TASKS[task], device=str(device))
    population = mutants(programs)

    def once() -> object:
        return train(made, population, horizon=horizon, seeds=range(seeds))

    parameters = sum(p.numel() for p in made.init(torch.Generator()).values())
    rate = programs * seeds * horizon / seconds(once, device, budget)
    return {"parameters": parameters, "run_steps_per_second": rate}


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    programs, seeds, horizon, budget = (3, 1, 2, 0.01) if small else (PROGRAMS, SEEDS, HORIZON, 1.0)
    for task in TASKS:
        yield attempt(
            {"task": task, "programs": programs, "runs": programs * seeds, "horizon": horizon},
            lambda task=task: speed(device, task, programs, seeds, horizon, budget),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows)
