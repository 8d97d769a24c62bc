"""Steps of runs of 256 different programs at once, 10,000 parameters each: the register machine of a symbolic search."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Row, attempt, launches, print_rows, seconds
from population import mutants, scalars, start

from metaopt.program.population import PopulationStep, encode

PROGRAMS, RUNS = 256, 1024


def speed(device: torch.device, programs: int, runs: int, size: int, budget: float) -> Row:
    """Steps of one run per second; every program has as many runs as any other."""
    if device.type == "cuda":
        from metaopt_kernels.population import TritonPopulationStep as Step
    else:
        Step = PopulationStep
    population = encode(mutants(programs))
    of_run = torch.arange(runs, device=device) % programs
    step = Step(population, of_run)
    params, grads, slots = start(population, runs, size, device)
    numbers = population.numbers(of_run, scalars(1))[0]

    def once() -> object:
        return step(params, grads, slots, numbers)

    return {"steps_per_second": runs / seconds(once, device, budget), "launches": launches(once)}


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    programs, runs, size, budget = (4, 8, 10, 0.01) if small else (PROGRAMS, RUNS, 10_000, 1.0)
    yield attempt(
        {"programs": programs, "runs": runs, "parameters": size},
        lambda: speed(device, programs, runs, size, budget),
    )


if __name__ == "__main__":
    print_rows(__doc__, rows)
