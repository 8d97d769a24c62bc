"""Tuned AdamW and tuned Lion as programs, for comparison with what a search finds."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.task import Task
from metaopt_symbolic.cascade import Cascade, Stage
from metaopt_symbolic.genome import Genome, from_rule, parse
from metaopt_symbolic.search import Budget, Candidate, Search, SearchConfig

SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "adamw": {"betas": ((0.9, 0.999), (0.9, 0.99), (0.8, 0.9)), "weight_decay": (0.0, 0.3, 1.0)},
    "lion": {"betas": ((0.9, 0.99), (0.5, 0.99), (0.0, 0.99)), "weight_decay": (0.0, 1.0, 3.0)},
}
"""What baselines are tuned over beside the learning rate: betas in use and those that win where runs are short. Where weights
overfit, decay is worth more than any change of a rule, so a search would seem to beat what has none."""

LEARNING_RATES = tuple(10 ** (-k / 2) for k in range(1, 9))
"""From 0.3 to 1e-4 by half-decades."""


def family(name: str) -> list[Genome]:
    """The rule ``name`` with each of its `SETTINGS` and the learning rate 1."""
    grid = SETTINGS[name]
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [from_rule(registry.create("optimizer", name, lr=1.0, **chosen)) for chosen in settings]


def tuned(genomes: list[Genome], tasks: Mapping[str, Task], stage: Stage, factors: tuple[float, ...]) -> Candidate:
    """The best of ``genomes``, each with the best of ``factors`` times its learning rate, on the runs of ``stage``."""
    judge = Cascade(tasks, [dataclasses.replace(stage, multipliers=factors)])
    scores = judge.scores([genome.program() for genome in genomes])
    best = max(range(len(scores)), key=lambda k: scores[k].fitness)
    return Candidate(genomes[best].scaled(scores[best].multiplier), scores[best], "", 0)


def baselines(tasks: Mapping[str, Task], stage: Stage) -> dict[str, Candidate]:
    """AdamW and Lion, each with the settings and the learning rate that are best on the runs of ``stage``, by name.

    Their fitness is what a candidate's would be that went through a cascade whose last stage this is.
    """
    return {name: tuned(family(name), tasks, stage, LEARNING_RATES) for name in SETTINGS}


START_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
NUMBER_FACTORS = (0.1, 0.3, 0.5, 2.0, 3.0, 10.0)
ROUNDS = 10
NUMBER_CANDIDATES = 1500
"""How many each search over numbers trains."""

_TUNING_SEEDS = (1000, 1001, 1002, 1003)
"""Of searches over numbers; other searches have small seeds."""


def tuned_start(text: str, tasks: Mapping[str, Task], stages: Sequence[Stage]) -> str:
    """The program ``text`` with numbers that suit the runs of ``stages``.

    Else a search would first find what tuning finds, and what is ahead of the start would be better tuned, not a better rule.
    Its learning rate is tuned first, then one number at a time; where that comes to a halt, four searches over all numbers go
    on, of which some find a better place: learning rate, decays and weight decay go together. Where each task has its own rate,
    they do not: numbers that suit the start to a tee hide what another rule would bring with its own.
    """
    best = tuned([parse(text)], tasks, stages[-1], START_FACTORS)
    for _ in range(ROUNDS):
        found = tuned([*_neighbours(best.genome)], tasks, stages[-1], (1.0,))
        if found.score.fitness <= best.score.fitness:
            break
        best = found
    start = best.genome.text()
    if stages[-1].own_rates or not any(isinstance(arg, float) for a in best.genome.body for arg in a.args):
        return start
    champions = []
    for seed in _TUNING_SEEDS:
        config = SearchConfig(
            start, "constants", options={"population": 200, "tournament": 10}, batch=100, seed=seed
        )  # fmt: skip
        with TemporaryDirectory() as directory:
            search = Search(config, Cascade(tasks, stages), directory)
            search.run(Budget(unique=NUMBER_CANDIDATES))
            champions.append(search.champion)
    return max(champions, key=lambda champion: champion.score.fitness).tuned.text()


def _neighbours(genome: Genome) -> Iterator[Genome]:
    """The program, and every one with another number; those from 0.5 to 1, as decays, are changed by their distance from 1."""
    yield genome
    for k, a in enumerate(genome.body):
        for i, arg in enumerate(a.args):
            if isinstance(arg, float):
                for factor in NUMBER_FACTORS:
                    number = max(0.0, round(1 - (1 - arg) * factor, 12)) if 0.5 <= arg < 1 else arg * factor
                    args = (*a.args[:i], number, *a.args[i + 1 :])
                    yield dataclasses.replace(
                        genome, body=(*genome.body[:k], a._replace(args=args), *genome.body[k + 1 :])
                    )


# -- kept ------------------------------------------------------------------------------------------------------------

TUNED_FILE = "tuned.json"


@dataclass(frozen=True)
class Tuned:
    """What is tuned before a search, and what it was tuned for.

    Attributes:
        asked: text of the program to start from, as the user gave it.
        judge: `metaopt_symbolic.report.describe` of the tasks and stages.
        start: its `tuned_start`.
        references: fitness of the `baselines`, by name.
    """

    asked: str
    judge: str
    start: str
    references: dict[str, float]

    def save(self, directory: Path) -> None:
        """Keep it for those who go on with the search in ``directory``."""
        write_atomic(directory / TUNED_FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def tuned_for(
    directory: Path, asked: str, judge: str, tasks: Mapping[str, Task], stages: Sequence[Stage], console: Console
) -> Tuned:
    """What is kept in ``directory``, and if there is nothing, what tuning finds, which takes seconds to minutes.

    Raises:
        ValueError: what is kept there is of another start, or of other tasks.
    """
    if not (directory / TUNED_FILE).is_file():
        doing = "tuning AdamW, Lion and the start for these tasks, some minutes"
        if not console.is_terminal:  # where a status shows nothing
            console.print(doing, soft_wrap=True)
        with console.status(doing):
            references = {name: found.score.fitness for name, found in baselines(tasks, stages[-1]).items()}
            return Tuned(asked, judge, tuned_start(asked, tasks, stages), references)
    kept = Tuned(**json.loads((directory / TUNED_FILE).read_text()))
    if kept.asked != asked:
        raise ValueError(
            f"{directory} holds a search with another start; give that one to go on ({TUNED_FILE} there has it), or choose "
            "another directory"
        )
    if kept.judge != judge:
        then = json.loads(kept.judge)
        raise ValueError(
            f"{directory} holds a search on the tasks {then['asked']!r} on {then['device']}, as they were then; give these to "
            "go on with it, or choose another directory"
        )
    return kept
