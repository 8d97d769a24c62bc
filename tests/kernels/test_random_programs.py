"""The Triton population machine on the random programs of ``tests/symbolic/test_round_trip.py``."""

from __future__ import annotations

import pytest
import torch
from random_genomes import Expectation, random_genomes, random_tensors, side_by_side

from metaopt_kernels.population import TritonPopulationStep

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter: 1 / 0 and the like
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # that of Triton 3.6
]

ERROR = 1e-11
"""Relative, of an operation: Triton's own ``pow`` takes exp2(y log2 x), which loses log2(y log2 x) bits, and tanh 1e-12."""

PROGRAMS = [genome.program() for genome in random_genomes(10_000)]
ROWS = random_tensors(PROGRAMS)


@pytest.mark.parametrize(("reductions", "every"), [(False, 1), (True, 8)])
def test_triton_agrees_on_all_without_reductions_and_on_one_in_eight_with_some(
    reductions: bool, every: int, device: torch.device
) -> None:
    """The interpreter takes 7 ms for a program without reductions, and 50 ms for one with some; a GPU runs all of them."""
    every = 1 if device.type == "cuda" else every
    chosen = [k for k, p in enumerate(PROGRAMS) if (p.reach != "element") == reductions][::every]
    programs, rows = [PROGRAMS[k] for k in chosen], [ROWS[k] for k in chosen]
    found = side_by_side(TritonPopulationStep, programs, rows, device)
    Expectation.of(programs, rows, ERROR).check(found, programs)
