"""From the elites of a search to a champion: gates of ever more foreign tasks, at each of which tuned AdamW is to be beaten.

A search overfits its tasks as a model does its data: the fitness of its best goes on rising when their worth elsewhere has
begun to fall. At every gate all contenders are tuned alike: for each task, the best of as many learning rates, memories and
weight decays (`settings`), on seeds apart from those that they are compared on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from metaopt import registry, suite
from metaopt.evaluate.statistics import Estimate, estimate
from metaopt.program.population import encode
from metaopt.search import Elite
from metaopt.task import Task
from metaopt_symbolic.baselines import LEARNING_RATES, SETTINGS, family
from metaopt_symbolic.evaluate import train
from metaopt_symbolic.genome import Assign, Genome, parse
from metaopt_symbolic.suites import SUITES, tasks_of

REFERENCE = "adamw"
"""Who holds the gates."""

FACTORS = tuple(10 ** (k / 2) for k in range(-5, 3))
"""Of a candidate's learning rate, which suits short runs: as many as the baselines have `LEARNING_RATES`."""

DECAY = 0.3
"""Weight decay of candidates that have none of their own."""

MEMORIES, DECAYS = (1.0, 0.3, 0.1), (1.0, 0.3, 0.0)
"""Factors of a candidate's numbers at the gates, where the baselines have `SETTINGS`: of the weights of new values in its
averages, which suit short runs, and of what its weights are multiplied by."""

TUNE_SEEDS = (5000, 5001)
SCORE_SEEDS = (6000, 6001, 6002, 6003, 6004)

WIDER, LONGER = 3, 600
"""Hidden layers at the first gate, against the search's, and its steps: ten times the work of a searched run, or more."""

CHEAP = 0.7
"""Milliseconds of a step of AdamW, at most, on the tasks of the second gate."""


@dataclass(frozen=True)
class Gate:
    """Tasks by name; each is trained for its own horizon, or for ``horizon`` steps."""

    name: str
    tasks: Mapping[str, Task]
    horizon: int | None = None


@dataclass(frozen=True)
class Result:
    """One contender at one gate.

    Attributes:
        contender: a baseline's name, or the digest of a candidate.
        losses: task -> the normalised validation loss at the end, of each seed.
        factors: task -> the factor of the learning rate that was tuned for it.
        ahead: AdamW's loss minus this one, of the same task and seed: the interquartile mean of all, and its interval.
    """

    contender: str
    losses: Mapping[str, Sequence[float]]
    factors: Mapping[str, float]
    ahead: Estimate

    @property
    def passes(self) -> bool:
        """Whether it is better than AdamW. That it surely is says only an interval above 0."""
        return self.ahead.iqm > 0


@dataclass(frozen=True)
class Funnelled:
    """What became of candidates.

    Attributes:
        gates: gate -> results of the contenders that came so far, the best first.
        found: the best at the last gate that anybody came to, as the search has it.
        passed: whether it was better than AdamW at every gate.
    """

    gates: Mapping[str, Sequence[Result]]
    found: Genome
    passed: bool

    @property
    def champion(self) -> Genome:
        """What took part: the best `with_decay`."""
        return with_decay(self.found)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            "found": self.found.text(),
            "champion": self.champion.text(),
            "passed": self.passed,
            "gates": {
                gate: [{**dataclasses.asdict(r), "passes": r.passes} for r in rows] for gate, rows in self.gates.items()
            },
        }


def usual_gates(searched: str, device: str = "cpu") -> tuple[Gate, Gate]:
    """The wider, longer version of the suite that was searched on, and the cheap tasks of ``valid`` with data; on ``device``.

    Raises:
        ValueError: not one suite of a search.
    """
    if searched not in SUITES:
        raise ValueError(
            f"the funnel takes a search on one suite ({', '.join(SUITES)}), this one was on {searched!r}; "
            "metaopt simplify takes its best candidate without a funnel"
        )
    specs = registry.specs("task")
    cheap = [
        name for name in suite.members("valid")
        if specs[name].facts["ms_per_step"] <= CHEAP and specs[name].facts["data"]
    ]  # fmt: skip
    return (
        Gate("wider and longer", tasks_of(searched, WIDER, device), LONGER),
        Gate("valid", {name: registry.create("task", name, device=device) for name in cheap}),
    )


def tuned(elite: Elite) -> Genome:
    """The program of an elite, at the learning rate of its score; proposers write other texts and give it beside theirs."""
    return parse(elite.facts.get("program", elite.text)).scaled(elite.facts["multiplier"])


def distinct(elites: Sequence[Elite], most: int) -> list[Genome]:
    """The best elites, at the learning rates of their scores, only one of those that differ in numbers alone."""
    chosen: dict[tuple[Any, ...], Genome] = {}
    for elite in sorted(elites, key=lambda e: e.score):
        genome = tuned(elite)
        skeleton = tuple((a.function, *(arg if isinstance(arg, str) else None for arg in a.args)) for a in genome.body)
        chosen.setdefault(skeleton, genome)
    return [*chosen.values()][:most]


def with_decay(genome: Genome) -> Genome:
    """The program with weight decay in what the learning rate multiplies, as in AdamW; itself if it has weight decay, or its
    update is no such product.

    Searches drop it where short runs of small networks do not overfit, and the baselines may choose it.
    """
    update = genome.outputs[0]
    at = max((k for k, a in enumerate(genome.body) if a.target == update), default=-1)
    if at < 0 or genome.body[at].function != "mul" or any(map(_decays, genome.body)):
        return genome
    args = genome.body[at].args
    factors = [arg for arg in args if isinstance(arg, str) and arg not in genome.scalars]
    direction = update if update in factors else factors[0] if len(factors) == 1 else None
    if direction is None or any(isinstance(arg, float) for arg in args):
        return genome
    taken = {*genome.tensors, *genome.scalars, *(a.target for a in genome.body)}
    names = itertools.chain(["shrink"], map("shrink{}".format, itertools.count()))
    name = next(name for name in names if name not in taken)
    added = Assign(name, "mul", ("w", DECAY)), Assign(direction, "add", (direction, name))
    return replace(genome, body=(*genome.body[:at], *added, *genome.body[at:]))


def _decays(a: Assign) -> bool:
    """Whether it is some of the weights."""
    return a.function == "mul" and "w" in a.args and any(isinstance(arg, float) for arg in a.args)


def funnel(candidates: Sequence[Genome], gates: Sequence[Gate]) -> Funnelled:
    """Compare the candidates, `with_decay`, with the baselines at gate after gate, as long as any passes.

    Raises:
        ValueError: no candidate, or no gate.
    """
    if not candidates or not gates:
        raise ValueError(f"a funnel needs candidates and gates, got {len(candidates)} and {len(gates)}")
    left = {with_decay(genome).digest: genome for genome in candidates}
    found: dict[str, Sequence[Result]] = {}
    passed = True
    for gate in gates:
        found[gate.name] = results = compare({digest: with_decay(genome) for digest, genome in left.items()}, gate)
        own = [r for r in results if r.contender in left]
        champion = left[own[0].contender]
        left = {r.contender: left[r.contender] for r in own if r.passes}
        if not left:
            passed = False
            break
    return Funnelled(found, champion, passed)


def settings(genome: Genome) -> list[Genome]:
    """The program with each of `MEMORIES` and `DECAYS`, so far as it has averages and weight decay; itself the first."""

    def changed(a: Assign, memory: float, decay: float) -> Assign:
        *others, last = a.args
        if a.function == "interpolate" and isinstance(last, float) and 0.5 <= last < 1:
            return a._replace(args=(*others, round(1 - (1 - last) * memory, 12)))
        if _decays(a):
            return a._replace(args=tuple(arg if isinstance(arg, str) else arg * decay for arg in a.args))
        return a

    made = [
        replace(genome, body=tuple(changed(a, memory, decay) for a in genome.body))
        for memory, decay in itertools.product(MEMORIES, DECAYS)
    ]
    return [*dict.fromkeys(made)]


def compare(candidates: Mapping[str, Genome], gate: Gate) -> list[Result]:
    """Train candidates and baselines on the tasks of a gate; the best first."""
    return ranked({name: (settings(genome), FACTORS) for name, genome in candidates.items()}, gate)


def ranked(contenders: Mapping[str, tuple[Sequence[Genome], Sequence[float]]], gate: Gate) -> list[Result]:
    """Train contenders, by name, and the baselines on the tasks of a gate; the best first.

    A contender is its settings and the factors of their learning rates: for each task it has the best of all pairs.
    """
    choices = {**{name: (family(name), LEARNING_RATES) for name in SETTINGS}, **contenders}
    losses: dict[str, dict[str, list[float]]] = {name: {} for name in choices}
    factors: dict[str, dict[str, float]] = {name: {} for name in choices}
    for task_name, task in gate.tasks.items():
        horizon = gate.horizon or task.horizon
        chosen = _tuned(choices, task, horizon)
        population = encode([genome.scaled(factor).program() for genome, factor in chosen.values()])
        runs = train(task, population, horizon=horizon, seeds=SCORE_SEEDS).losses[:, 0, :, -1]
        for (name, (_, factor)), own in zip(chosen.items(), runs.tolist(), strict=True):
            losses[name][task_name], factors[name][task_name] = own, factor
    reference = losses[REFERENCE]
    results = [
        Result(
            name, own, factors[name],
            estimate([np.subtract(reference[task], of_task) for task, of_task in own.items()]),
        )
        for name, own in losses.items()
    ]  # fmt: skip
    return sorted(results, key=lambda r: -r.ahead.iqm)


def _tuned(
    choices: Mapping[str, tuple[Sequence[Genome], Sequence[float]]], task: Task, horizon: int
) -> dict[str, tuple[Genome, float]]:
    """Of each contender the program and the factor that are best on the seeds for tuning."""
    chosen = {}
    by_factors: dict[Sequence[float], list[tuple[str, Genome]]] = {}
    for name, (genomes, factors) in choices.items():
        by_factors.setdefault(factors, []).extend((name, genome) for genome in genomes)
    for factors, members in by_factors.items():
        population = encode([genome.program() for _, genome in members])
        runs = train(task, population, horizon=horizon, seeds=TUNE_SEEDS, multipliers=factors)
        found = runs.losses[..., -1].mean(2)
        for name in dict.fromkeys(name for name, _ in members):
            own = [k for k, (other, _) in enumerate(members) if other == name]
            k, m = divmod(int(found[own].argmin()), len(factors))
            chosen[name] = members[own[k]][1], factors[m]
    return chosen


def table(found: Funnelled) -> Table:
    """Who came how far."""
    made = Table("gate", "contender", "ahead of tuned AdamW by", "95 % interval", "")
    for gate, results in found.gates.items():
        for r in results:
            verdict = "" if r.contender in SETTINGS else "passes" if r.passes else "is cut"
            made.add_row(
                gate, r.contender, f"{r.ahead.iqm:+.4f}", f"[{r.ahead.low:+.4f}, {r.ahead.high:+.4f}]", verdict
            )
        made.add_section()
    return made
