"""Symbolic regression: short programs whose outputs match those of a target that is known at points only.

Evolution searches structures alone; the numbers of each are fitted by least squares, and so are weights of what it reads, as in
Operon (Burlacu, Kronberger and Kommenda, 2020, https://doi.org/10.1145/3377929.3398099). What comes out is a front: for each
length the program with the least error, as in PySR (Cranmer, 2023, https://arxiv.org/abs/2305.01582).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from metaopt.interruptions import interruptions
from metaopt.program.program import Arg, Program
from metaopt_symbolic.analysis import analyse, live_part
from metaopt_symbolic.cascade import Score
from metaopt_symbolic.distill.checkpoint import Checkpoint, load, search_key
from metaopt_symbolic.genome import LOSS, Assign, Genome
from metaopt_symbolic.search import Budget, Counts
from metaopt_symbolic.searchers import Evolution
from metaopt_symbolic.simplify import ablations, simplify

FLOOR = 1e-5
"""An error below which a program counts as exact: numbers are fitted no better than that."""

ALIKE = 1.5
"""The knee is among the programs whose error is at most this many times the least; PySR's number."""

LIKELY = 8
"""How many of the programs that lack a statement get their numbers fitted."""

BEST = 3
"""How many fits of a front are shortened."""

QUICK, THOROUGH = 8, 100
"""Steps of least squares, in the search and after it."""

BATCH, POPULATION, TOURNAMENT, PATIENCE = 100, 400, 4, 4000
WELCOME = 100
"""Of the search: children of a generation, members, and so on as of `Evolution`; the best starts that are members at first."""

SAVE_EVERY = 30.0
"""Seconds between two checkpoints."""

PARSIMONY = 0.03
"""Decades of error that a statement must gain."""

MUTATION = {"insert": 2.0, "splice": 0.9, "duplicate": 0.3}
"""As of the searcher ``effective``, but for the numbers, and so that most children are new structures."""

_FAR = 1e6
"""What a residual counts that is no number."""

_NONE = np.zeros((1, 0))
"""One choice of no numbers."""


class Target(Protocol):
    """What is to be matched."""

    wanted: NDArray[np.float64]
    """float64 [M]."""

    @property
    def sizes(self) -> Mapping[str, float]:
        """Magnitudes of what a loss reads, by name."""

    def outputs(self, program: Program, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a program gives in the place of ``wanted``, for K choices of its numbers.

        Args:
            program: beside the scalars of an optimizer it has N scalars `number_name(0)`, `number_name(1)`, ...
            numbers: their values, float64 [K, N].

        Returns:
            [K, M].
        """


@dataclass(frozen=True)
class Fit:
    """A program and how far it is from the target.

    Attributes:
        genome: without redundant statements.
        error: the root mean square of what is missing, in units of the target's; 0 is the target, 1 as good as nothing.
    """

    genome: Genome
    error: float

    @property
    def length(self) -> int:
        """Statements."""
        return len(self.genome.body)


class Front:
    """For each length the best fit, where none that is shorter is as good."""

    def __init__(self) -> None:
        self._best: dict[int, Fit] = {}

    def add(self, fit: Fit) -> None:
        """Keep ``fit`` if it is the best of its length."""
        known = self._best.get(fit.length)
        if math.isfinite(fit.error) and (known is None or fit.error < known.error):
            self._best[fit.length] = fit

    @property
    def fits(self) -> list[Fit]:
        """From the shortest to the longest, with falling errors."""
        kept: list[Fit] = []
        for length in sorted(self._best):
            if not kept or self._best[length].error < kept[-1].error:
                kept.append(self._best[length])
        return kept

    @property
    def best(self) -> Fit:
        """With the least error."""
        return self.fits[-1]

    @property
    def knee(self) -> Fit:
        """Among the fits that are nearly the best, the one whose last statements lower the logarithm of the error most."""
        fits = self.fits
        errors = [max(fit.error, FLOOR) for fit in fits]
        gains = [0.0] + [
            math.log(errors[k - 1] / errors[k]) / (fits[k].length - fits[k - 1].length) for k in range(1, len(fits))
        ]
        near = [k for k in range(len(fits)) if errors[k] <= ALIKE * errors[-1]]
        return fits[max(near, key=lambda k: (gains[k], -k))]


# -- numbers -------------------------------------------------------------------------------------------------------------


def number_name(k: int) -> str:
    """What the k-th number of a program is called as a scalar."""
    return f"number_{k}"


def numbers_of(genome: Genome) -> NDArray[np.float64]:
    """Its literals in order, [N]."""
    return np.array([arg for a in genome.body for arg in a.args if isinstance(arg, float)])


def with_numbers(genome: Genome, numbers: Iterable[Arg], scalars: Sequence[str] = ()) -> Genome:
    """The program with other literals in order, or with names for them, which ``scalars`` lists."""
    given = iter(numbers)
    body = [
        a._replace(args=tuple(next(given) if isinstance(arg, float) else arg for arg in a.args)) for a in genome.body
    ]
    return dataclasses.replace(genome, body=tuple(body), scalars=(*genome.scalars, *scalars))


def error_of(target: Target, program: Program) -> float:
    """The error of a program as it is; infinity where it is not finite."""
    return _error(target.outputs(program, _NONE)[0], target.wanted)


def _error(given: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    missing = np.abs(given - wanted)
    largest = missing.max()
    if not largest > 0 or not math.isfinite(largest):
        return 0.0 if largest == 0 else math.inf
    return float(largest * np.sqrt(((missing / largest) ** 2).mean() / (wanted**2).mean()))


def polished(target: Target, genome: Genome, steps: int = THOROUGH) -> Fit:
    """The program with its numbers fitted by least squares (Levenberg-Marquardt), from where they are.

    Args:
        target: to match.
        genome: valid, without redundant statements.
        steps: of the fit, at most.
    """
    wanted = target.wanted
    first = target.outputs(genome.program(), _NONE)[0]
    if not np.isfinite(first).all():
        return Fit(genome, math.inf)
    genome = _scaled(genome, _factor(first, wanted))
    start = numbers_of(genome)
    if not 0 < len(start) <= len(wanted):
        return Fit(genome, error_of(target, genome.program()))
    names = [number_name(k) for k in range(len(start))]
    program = with_numbers(genome, names, names).program()
    unit = math.sqrt(float((wanted**2).sum()))
    best, derivatives = (math.inf, start), dict[bytes, NDArray[np.float64]]()

    def residuals(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """[M]; the derivatives cost little more, because all numbers are moved at once."""
        nonlocal best
        sizes = 1e-6 * np.maximum(np.abs(numbers), 1e-3)
        given = target.outputs(program, np.vstack([numbers, numbers + np.diag(sizes)]))
        best = min(best, (_error(given[0], wanted), numbers.copy()), key=lambda pair: pair[0])
        missing = given - wanted
        rows = np.where(np.isfinite(missing), np.clip(missing, -_FAR, _FAR), _FAR) / unit
        derivatives[numbers.tobytes()] = (rows[1:] - rows[0]).T / sizes
        return rows[0]

    least_squares(
        residuals, start, lambda x: derivatives[x.tobytes()], method="lm", x_scale="jac", max_nfev=steps, ftol=1e-10
    )
    error, numbers = best
    return Fit(with_numbers(genome, map(float, numbers)), error)


def _factor(given: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """The factor above 0 that brings ``given`` nearest to ``wanted`` (Keijzer, 2003, EuroGP); 1 if there is none."""
    largest = float(np.abs(given).max())
    if not 0 < largest < math.inf:
        return 1.0
    y = given / largest
    factor = float(y @ wanted) / float(y @ y) / largest
    return factor if 0 < factor < math.inf else 1.0


def _scaled(genome: Genome, factor: float) -> Genome:
    """The program whose output is ``factor`` times as large."""
    if abs(factor - 1) < 1e-9:
        return genome
    if not genome.is_loss:
        return genome.scaled(factor)
    *before, last = genome.body
    if last.function == "mul" and isinstance(last.args[1], float):
        return dataclasses.replace(genome, body=(*before, last._replace(args=(last.args[0], last.args[1] * factor))))
    return dataclasses.replace(genome, body=(*genome.body, Assign(LOSS, "mul", (LOSS, factor))))


def weighted(genome: Genome, sizes: Mapping[str, float]) -> Genome:
    """A loss with a number before each input that it reads, and before what it adds.

    Products have one; so a structure of few statements stands for all formulas that differ from it in scales.

    Args:
        genome: of a loss.
        sizes: of the inputs; a weight is one by it at first.
    """
    body: list[Assign] = []
    inputs = {*genome.tensors}

    def weigh(name: str) -> str:
        body.append(Assign(f"weighted_{len(body)}", "mul", (name, 1 / sizes[name] if name in inputs else 1.0)))
        return body[-1].target

    for target, function, args in genome.body:
        new: list[Arg] = []
        for place, arg in enumerate(args):
            is_factor = function in ("mul", "div") and (place == 1 or isinstance(args[1], float))
            is_second = place == 1 and function in ("add", "sub", "max", "min")
            weighs = isinstance(arg, str) and ((arg in inputs and not is_factor) or is_second)
            new.append(weigh(arg) if weighs and isinstance(arg, str) else arg)
        body.append(Assign(target, function, tuple(new)))
        inputs.discard(target)
    return dataclasses.replace(genome, body=tuple(body))


# -- structures ----------------------------------------------------------------------------------------------------------


TERMS = ("tanh", "exp", "logsigmoid", "sigmoid", "square", "abs", "relu", "arctan", "log1p", "sqrt", "sign")
"""Functions of one input that small formulas are made of."""


def small_formulas(inputs: tuple[str, ...]) -> Iterator[Genome]:
    """Losses of one term, f(x) or x, and sums, differences and products of two that read one input, or one of which is one."""
    terms = [(x, "copy") for x in inputs] + [(x, f) for x in inputs for f in TERMS]
    for k, (x, f) in enumerate(terms):
        yield _formula(inputs, [(x, f)], "copy")
        for y, g in terms[k + 1 :]:
            if f == "copy" or x == y:
                yield from (_formula(inputs, [(x, f), (y, g)], join) for join in ("add", "sub", "mul"))


def _formula(inputs: tuple[str, ...], terms: Sequence[tuple[str, str]], join: str) -> Genome:
    made = [Assign(f"term_{k}", f, (x,)) for k, (x, f) in enumerate(terms) if f != "copy"]
    names = tuple(x if f == "copy" else f"term_{k}" for k, (x, f) in enumerate(terms))
    last = Assign(LOSS, "mul", (*names, 1.0)) if join == "copy" else Assign(LOSS, join, names)
    return Genome(inputs, (), (LOSS,), (*made, last))


def search(
    target: Target,
    starts: Sequence[Genome],
    budget: Budget,
    *,
    functions: str,
    seed: int = 0,
    file: Path | None = None,
    on_generation: Callable[[Front, Counts], None] = lambda front, counts: None,
) -> Front:
    """Search for programs that match ``target``; returns the front, with numbers fitted and weights in the programs.

    Args:
        target: to match.
        starts: programs to start from: the one that can be fitted best, and `WELCOME` others.
        budget: when to stop; a program that is exact ends the search too.
        functions: what new statements call, a key of `metaopt_symbolic.language.INSERTED`.
        seed: of everything random.
        file: what a search that was stopped goes on from, is written there every `SAVE_EVERY` seconds and at the end.
        on_generation: called after each.

    Raises:
        ValueError: no start gives finite outputs, or the file is of another search.
        KeyboardInterrupt: Ctrl-C, after the generation at hand, which is saved.
    """
    front, key = Front(), search_key(target.wanted, functions, seed)
    saved = None if file is None else load(file, key)
    rng, began = np.random.default_rng(seed), time.monotonic()
    before = 0.0 if saved is None else saved.counts.seconds

    def fitted(genome: Genome) -> Fit:
        fit = polished(target, weighted(genome, target.sizes) if genome.is_loss else genome, QUICK)
        front.add(fit)
        return fit

    searcher = Evolution(
        population=POPULATION, tournament=TOURNAMENT, patience=PATIENCE, parsimony=PARSIMONY, functions=functions,
        mutation=MUTATION,
    )  # fmt: skip
    known: dict[int, float] = {}
    if saved is None:
        fits = [(fitted(genome).error, genome) for genome in starts]
        counts = Counts(unique=len(fits))
        error, start = min(fits, key=lambda pair: pair[0])
        if not math.isfinite(error):
            raise ValueError("no program to start from is finite at the points of the target")
        searcher.begin(start, _fitness(error))
        for other_error, other in sorted(fits, key=lambda pair: -pair[0])[-WELCOME:]:
            searcher.welcome(other, _fitness(other_error))
    else:
        start, error, counts = saved.start, saved.error, saved.counts
        for genome, of in saved.front:
            front.add(Fit(genome, of))
        known |= saved.known
        rng.bit_generator.state = saved.rng
        searcher.begin(start, _fitness(error))
        searcher.restore(saved.searcher)

    def save() -> None:
        if file is not None:
            kept = tuple((fit.genome, fit.error) for fit in front.fits)
            Checkpoint(start, error, kept, known, counts, rng.bit_generator.state, searcher.state()).save(file, key)

    told = time.monotonic()
    with interruptions() as interrupted:
        while not budget.is_spent(counts) and front.best.error > FLOOR and not interrupted:
            children, _ = searcher.ask(BATCH, rng)
            # numbers are fitted: only structures differ
            analysis = analyse(dataclasses.replace(children, constants=np.ones_like(children.constants)))
            hashes = analysis.hashes.tolist()
            for k, structure in enumerate(hashes):
                if structure not in known:
                    known[structure] = fitted(live_part(children[k], analysis, k)).error
                    counts.unique += 1
            searcher.tell(children, _fitness(np.array([known[h] for h in hashes])))
            counts.generations += 1
            counts.children += len(hashes)
            counts.seconds = before + time.monotonic() - began
            on_generation(front, counts)
            if time.monotonic() - told > SAVE_EVERY:
                save()
                told = time.monotonic()
    save()
    if interrupted:
        raise KeyboardInterrupt
    return front


def _fitness(error: Any) -> Any:
    """In decades, so that half the error is worth as much everywhere."""
    return -np.log10(np.clip(error, FLOOR, 1 / FLOOR))


def shortened(target: Target, front: Front) -> None:
    """Add to the front what is left of its best fits when statements are left out, one after another, and numbers fitted
    anew."""
    for fit in front.fits[-BEST:]:
        fit = polished(target, fit.genome)
        front.add(fit)
        while fit.length > 1:
            shorter = [*{g.digest: g for g in ablations(fit.genome) if len(g.body) < fit.length}.values()]
            likely = sorted(shorter, key=lambda g: error_of(target, g.program()))[:LIKELY]
            found = [polished(target, genome, 3 * QUICK) for genome in likely]
            found = [f for f in found if f.length < fit.length and math.isfinite(f.error)]
            if not found:
                break
            fit = min(found, key=lambda f: f.error)
            front.add(fit)


def rounded(target: Target, fit: Fit, tolerance: float) -> Fit:
    """The fit with its numbers in few digits, and without what then does nothing.

    Args:
        target: to match.
        fit: of a program.
        tolerance: error that this may add.
    """

    def scores(programs: Sequence[Program]) -> list[Score]:
        return [Score(-error_of(target, program), 0, {}, 1.0, 0.0, 0) for program in programs]

    found = simplify(fit.genome, scores, tolerance=tolerance)
    return Fit(found.genome, -found.after)
