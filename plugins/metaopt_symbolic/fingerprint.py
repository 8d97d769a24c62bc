"""What programs do, as numbers to compare: the same for programs that differ only in how they say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metaopt.program.population import PopulationStep, encode
from metaopt.program.program import Program, evaluate

_PROBES, _STEPS, _SHAPES = 2, 4, ((30, 20), (8, 50))
"""Of two matrices, a tall and a wide one, so that norms of a tensor and of the tree differ; a slot that was written can pass
through two others. There are many elements because a thousandth of a constant changes one sign of a thousand."""

_AT_ONCE = 256
"""Programs, so that memory stays small."""

_BITS = 17
"""Of a number's 53: five decimal digits."""

_NEGLIGIBLE = 1e-12
"""Of the largest update of a probe: what is left of terms that cancel."""


class Fingerprints(NamedTuple):
    """What N programs do on two probes.

    Attributes:
        hashes: uint64 [N, 2], of the updates in five digits, one of each probe. Programs that differ only by algebra agree in
            both, but for one in thousands of those whose terms cancel, by rounding. Programs whose constants differ by a
            thousandth agree in neither, unless they round by themselves: of ``sign``, all 8000 signs may be the same.
        finite: bool [N], whether all updates are.
        uses_gradient: bool [N], whether other gradients give other updates; of a loss, whether it has a slope anywhere.

    Where programs are losses, for updates read slopes by the inputs: through them alone a loss acts.
    """

    hashes: NDArray[np.uint64]
    finite: NDArray[np.bool_]
    uses_gradient: NDArray[np.bool_]


def fingerprint(programs: Sequence[Program]) -> Fingerprints:
    """Run programs on random inputs, always the same ones, in float64: optimizers for a few steps, losses on a batch.

    Both probes have the same parameters and learning rates. Magnitudes of gradients spread from 1e-4 to 1, so that what is
    defined only within [-1, 1], as arcsin, is finite. Of a loss, inputs spread from 1e-3 to 30.

    Args:
        programs: of the same scalars, and of the same inputs where they are losses.
    """
    parts = [_fingerprint(programs[k : k + _AT_ONCE]) for k in range(0, len(programs), _AT_ONCE)]
    nothing = Fingerprints(np.zeros((0, _PROBES), np.uint64), np.zeros(0, bool), np.zeros(0, bool))
    return Fingerprints(*(np.concatenate(columns) for columns in zip(nothing, *parts, strict=True)))


def _fingerprint(programs: Sequence[Program]) -> Fingerprints:
    losses = not programs[0].is_rule
    updates = _slopes(programs) if losses else _updates(programs)
    probes = _rounded(updates).reshape(len(programs) * _PROBES, -1)
    digests = b"".join(blake2b(probe.tobytes(), digest_size=8).digest() for probe in probes)
    hashes = np.frombuffer(digests, np.uint64).reshape(-1, _PROBES)
    finite = np.all(np.isfinite(updates), axis=(1, 2, 3))
    moves = np.any(updates != 0, axis=(1, 2, 3)) if losses else hashes[:, 0] != hashes[:, 1]
    return Fingerprints(hashes, finite, moves)


def _updates(programs: Sequence[Program]) -> NDArray[np.float64]:
    """[N, probes, steps, elements]."""
    count, elements = len(programs), sum(map(math.prod, _SHAPES))
    rng = np.random.default_rng(0)

    def spread(shape: Sequence[int], low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(low, high, shape))

    params = spread((_STEPS, 1, elements), -2, 1).expand(-1, _PROBES, -1)
    # an element's own are of one magnitude, so that averages of them may well change their signs
    grads = spread((_STEPS, _PROBES, elements), -1, 0) * 10 ** torch.from_numpy(rng.uniform(-3, 0, elements))
    scalars = {
        name: torch.from_numpy(np.arange(1.0, _STEPS + 1) if name == "t" else rng.uniform(0.05, 1, _STEPS))[None]
        for name in programs[0].scalars
    }
    population = encode([_of_update(program) for program in programs])
    runs = torch.arange(count).repeat_interleave(_PROBES)
    step = PopulationStep(population, runs, _SHAPES)
    numbers = population.numbers(runs, scalars, torch.float64).expand(_STEPS, -1, -1)
    slots = torch.zeros(population.kernel.inputs - 2, len(runs), elements, dtype=torch.float64)
    updates = params.repeat(1, count, 1)
    for k in range(_STEPS):
        step(updates[k], grads[k].repeat(count, 1), slots, numbers[k])
    return updates.unflatten(1, (count, _PROBES)).permute(1, 2, 0, 3).numpy()


def _slopes(programs: Sequence[Program]) -> NDArray[np.float64]:
    """[N, probes, inputs, examples]."""
    rng, examples = np.random.default_rng(0), sum(map(math.prod, _SHAPES))
    shape = len(programs[0].tensors), examples
    inputs = [
        torch.from_numpy(rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(-3, 1.5, shape)) for _ in range(_PROBES)
    ]
    scalars = {name: rng.uniform(0.05, 1) for name in programs[0].scalars}
    slopes = np.empty((len(programs), _PROBES, *shape))
    for k, program in enumerate(programs):
        for probe, values in enumerate(inputs):
            columns = values.clone().requires_grad_()
            (loss,) = evaluate(program, dict(zip(program.tensors, columns, strict=True)), scalars)
            nothing = 0 * columns.sum()  # comparisons alone have no slope to ask for
            (slope,) = torch.autograd.grad(loss.sum() + nothing, columns)
            slopes[k, probe] = torch.where(torch.isfinite(loss), slope, torch.nan)
    return slopes


def _rounded(updates: NDArray[np.float64]) -> NDArray[np.float64]:
    """To five digits, one bit pattern for each number that results."""
    largest = np.abs(updates).max((2, 3), keepdims=True)
    kept = np.where(np.abs(updates) < _NEGLIGIBLE * largest, 0.0, updates)
    mantissa, exponent = np.frexp(np.where(np.isnan(kept), np.nan, kept))
    with np.errstate(over="ignore"):
        return np.ldexp(np.rint(np.ldexp(mantissa, _BITS)), exponent - _BITS) + 0.0  # -0.0 is 0.0


def _of_update(program: Program) -> Program:
    """With the update in place of the new parameter, from which it could be recovered only to the digits of the parameter."""
    (last,) = (s for s in program.statements if s.target == program.outputs[0])
    return Program(program.scalars, program.tensors, program.statements, (last.args[1], *program.outputs[1:]))
