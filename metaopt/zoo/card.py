"""The card of a published rule or loss: what it says, how it is read, and how it looks. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from metaopt.hookspecs import Spec

CARD_FILE, PAGE_FILE = "card.json", "README.md"


@dataclass(frozen=True)
class Card(ABC):
    """What is known of every entry. ``card.json`` holds the fields of one of the cards below, and no others.

    Attributes:
        kind: ``weights``, ``program`` or ``loss``.
        gives: the kind of what it makes (`metaopt.registry.KINDS`).
        made, record: how that is made, and the file of the entry that says with which settings.
        judged: what ``scores`` hold.
        name: of the entry and of its directory.
        summary: one line.
        license: of the weights, the program or the loss.
        limits: what it was not tried on, and where it is known to fail.
        created: date, YYYY-MM-DD.
        sha256: of the file with the weights, the program or the loss.
        command: what repeats the meta-training or the search in the entry's directory, line by line.
        seed, device: of that.
        cost: of that: what was counted -> how much.
        tasks: what it was made on: names of tasks, families and suites.
        data: data source -> its licence.
        versions: of metaopt, torch and python when the entry was made.
        scores: a race with it (`metaopt.zoo.make.scores_of`), or a comparison with other losses.
        golden: the first losses of one training run: ``task``, ``content`` (its `metaopt.suite.content_hash`), ``seed``,
            ``losses``, and ``rtol``, the relative difference that other machines may show.
    """

    kind: ClassVar[str]
    gives: ClassVar[str] = "optimizer"
    made: ClassVar[str]
    record: ClassVar[str]
    judged: ClassVar[frozenset[str]] = frozenset(
        {"label", "protocol", "versions", "ranking", "aggregate", "entries", "differences", "against_adamw"}
    )

    name: str
    summary: str
    license: str
    limits: str
    created: str
    sha256: str
    command: str
    seed: int
    device: str
    cost: dict[str, Any]
    tasks: list[str]
    data: dict[str, str]
    versions: dict[str, str]
    scores: dict[str, Any]
    golden: dict[str, Any]

    def __post_init__(self) -> None:
        may_be_empty = ("options", "hyperparameters", "data")  # a rule without; tasks that are generated
        hints = get_type_hints(type(self))
        for name in (f.name for f in dataclasses.fields(self)):
            value, kind = getattr(self, name), getattr(hints[name], "__origin__", hints[name])
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")
            if isinstance(value, (str, list, dict)) and not value and name not in may_be_empty:
                raise ValueError(f"{name} must not be empty; say what is known of it")
        for name, wanted in (("golden", _GOLDEN), ("scores", self.judged)):
            missing = wanted - getattr(self, name).keys()
            if missing:
                raise ValueError(f"{name} must hold {', '.join(sorted(wanted))}; it lacks {', '.join(sorted(missing))}")

    @property
    @abstractmethod
    def what(self) -> str:
        """The rule in one line of Markdown."""


@dataclass(frozen=True)
class WeightsCard(Card):
    """The card of meta-trained weights, ``theta.safetensors``, beside ``config.json``, the run's own record of its settings.

    There is a command for each run where it began with the theta of another (``phase1_config.json``). The cost is
    ``outer_steps``, and as far as the runs recorded them ``inner_steps`` and ``seconds``.

    Attributes:
        learned_optimizer, options: the learned rule (registered name) that the weights belong to.
        meta_parameters: how many numbers were learned.
    """

    kind, made, record = "weights", "Meta-trained", "config.json"

    learned_optimizer: str
    options: dict[str, Any]
    meta_parameters: int

    @property
    def what(self) -> str:
        """See `Card`."""
        return f"`{self.learned_optimizer}`({_arguments(self.options)}): {self.meta_parameters:,} meta-parameters"


@dataclass(frozen=True)
class ProgramCard(Card):
    """The card of a rule that a program search found, ``rule.py``, beside ``report.json``, the search's own record.

    The cost, of the search alone, is ``children``, ``trained_candidates``, ``inner_steps`` and ``seconds``; of a search by
    proposers that of `LossCard`.

    Attributes:
        program: the text of what the rule was traced to (`metaopt.program.parse_program` reads it).
        hyperparameters: name -> default.
    """

    kind, made, record = "program", "Searched", "report.json"

    program: str
    hyperparameters: dict[str, Any]

    @property
    def what(self) -> str:
        """See `Card`."""
        return f"A program of {len(self.program.splitlines())} lines ({_arguments(self.hyperparameters)})"


@dataclass(frozen=True)
class LossCard(Card):
    """The card of a loss that a search found, ``loss.txt``, beside ``report.json``, the search's own record.

    The cost, of the search alone, is ``proposals``, ``trained_candidates``, ``seconds`` and, of language models, ``tokens``
    and ``money``. The scores are of ``metaopt discover compare``: ``label``, the contestant that is this loss; ``report``, the
    tasks and seeds; ``best``; and ``contestants``, each with its setting and, as mean and 95 % interval over seeds, by task
    and of their mean, ``loss``, ``win_rate``, ``kl``, and ``behind``: by how much the loss of this entry's policy is above
    its own, paired by seed.

    Attributes:
        objective: what kind of loss it is (`metaopt.objective.INPUTS`).
        inputs: of it.
        program: its text, that of ``loss.txt``, which `metaopt.program.read_loss` reads: it is never executed.
        hyperparameters: name -> default.
        lineage: whence it is, candidate by candidate.
    """

    kind, gives, made, record = "loss", "objective", "Searched", "report.json"
    judged = frozenset({"label", "report", "best", "contestants"})

    objective: str
    inputs: list[str]
    program: str
    hyperparameters: dict[str, Any]
    lineage: list[str]

    @property
    def what(self) -> str:
        """See `Card`."""
        return f"A {self.objective} loss of {', '.join(self.inputs)} ({_arguments(self.hyperparameters)})"


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


_GOLDEN = {"task", "content", "seed", "losses", "rtol"}


def read_card(directory: Path | str) -> Card:
    """The card of the entry in ``directory``.

    Raises:
        ValueError: there is none, or it is not complete; says what is missing.
    """
    path = Path(directory) / CARD_FILE
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no card of a zoo entry ({error}); metaopt zoo add writes one") from None
    given = set(fields) if isinstance(fields, dict) else set()
    kind = LossCard if "objective" in given else ProgramCard if "program" in given else WeightsCard
    known = {f.name for f in dataclasses.fields(kind)}
    if given != known:
        lacks, foreign = sorted(known - given), sorted(given - known)
        wrong = f"it lacks {', '.join(lacks)}" if lacks else f"{', '.join(foreign)} does not belong there"
        raise ValueError(f"{path} is not a complete card: {wrong}")
    try:
        card = kind(**fields)
    except ValueError as error:
        raise ValueError(f"{path} is not a complete card: {error}") from None
    if card.name != path.parent.name:
        raise ValueError(f"{path} is the card of {card.name!r}; an entry's directory has its name")
    return card


def entries(directory: Path | str) -> list[Spec]:
    """What a plugin's ``metaopt_zoo_rules`` hook returns: one `Spec` for each entry (a directory with a card) in ``directory``.

    An entry whose card is not complete is listed as unusable, so that it hides no other; using it says why.
    """
    return [_spec(path.parent) for path in sorted(Path(directory).glob(f"*/{CARD_FILE}"))]


def _spec(directory: Path) -> Spec:
    factory, arguments = "metaopt.zoo.entry:load", {"directory": str(directory)}
    try:
        card = read_card(directory)
    except ValueError as error:
        return Spec(directory.name, factory, f"unusable: {error}", defaults=arguments)
    own = ("learned_optimizer", "meta_parameters") if isinstance(card, WeightsCard) else ()
    facts = {
        "holds": card.kind,
        "gives": card.gives,
        **{name: getattr(card, name) for name in own},
        "tasks": ", ".join(card.tasks),
        "license": card.license,
        "created": card.created,
    }
    return Spec(card.name, factory, card.summary, defaults=arguments, facts=facts)


# --- the page ---------------------------------------------------------------------------------------------------------


def render(card: Card) -> str:
    """The card as a page of Markdown."""
    program = f"\n```python\n{card.program.rstrip()}\n```\n" if isinstance(card, ProgramCard | LossCard) else ""
    cost = ", ".join(f"{value:,.0f} {name.replace('_', ' ')}" for name, value in card.cost.items())
    data = "; ".join(f"{name} ({licence})" for name, licence in card.data.items()) or "generated"
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    return f"""# {card.name}

{card.summary}

{card.what}. Licence: {card.license}. {card.created}.
{program}
{_use_of_loss(card) if isinstance(card, LossCard) else _use(card)}

## How it was made

```
{card.command}
```

{card.made} on {", ".join(card.tasks)}; data: {data}. Seed {card.seed}, on {card.device}; {cost}. {versions}.
`{card.record}` is beside this page. sha256 of the {card.kind}: `{card.sha256}`.
{_lineage(card) if isinstance(card, LossCard) else ""}
## Scores

{_comparison(card.scores) if isinstance(card, LossCard) else _scores(card.scores)}

## Limits

{card.limits}
"""


def _use(card: Card) -> str:
    return f"""```python
optimizer = metaopt.optimizer("zoo:{card.name}", model)
```

```
metaopt race zoo:{card.name} adamw --tasks digits_conv
metaopt export zoo:{card.name} --to {card.name}.py
metaopt zoo verify {card.name}
```"""


def _use_of_loss(card: LossCard) -> str:
    return f"""```python
objective = metaopt.create("objective", "zoo:{card.name}")
```

```
metaopt zoo verify {card.name}
```"""


def _lineage(card: LossCard) -> str:
    lines = "\n".join(f"- {line}" for line in card.lineage)
    return f"\nWhence it is, with its scores in the search and their 95 % intervals, the latest first:\n\n{lines}\n"


def _comparison(scores: Mapping[str, Any]) -> str:
    label, report, contestants = scores["label"], scores["report"], scores["contestants"]
    tasks = [regime["name"] for regime in report["regimes"]]
    parts = [name for name in contestants[label]["loss"] if name != "mean"]
    lines = [
        f"Policies on the test split of {len(tasks)} tasks ({', '.join(tasks)}), {report['horizon']} steps, "
        f"{len(report['seeds'])} seeds, of data, initial parameters and batches alike: mean [95 % interval over seeds]. "
        "Loss: 1 is the reference policy, 0 the best answers. Behind: the loss of this entry's policy less theirs, paired by "
        "seed; below 0 this entry is better. Every contestant is at the setting that was best on other tasks, on which the "
        "found ones were selected.",
        "",
        "![Losses of policies by task, and what divergence from the reference they are paid with](comparison.png)",
        "",
        "| contestant | loss | behind | win rate | KL, nats | beta | learning rate | settings tried |",
        "|---" * 8 + "|",
    ]
    for name, of in contestants.items():
        own = "".join(f", {number} {value:g}" for number, value in of["numbers"].items())
        behind = "" if name == label else _mean(of["behind"]["mean"])
        values = (_mean(of[measure]["mean"]) for measure in ("win_rate", "kl"))
        cells = (
            _mean(of["loss"]["mean"]),
            behind,
            *values,
            f"{of['beta']:.3g}{own}",
            f"{of['rate']:g}",
            str(of["tried"]),
        )
        lines.append(f"| {'**' + name + '**' if name == label else name} | {' | '.join(cells)} |")
    head = [f"| contestant | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
    others = {name: of["behind"] for name, of in contestants.items() if name != label}
    lines += ["", "Losses, of the mean of some tasks and by task:", "", *head]
    lines += [f"| {name} | {' | '.join(_mean(of['loss'][p]) for p in parts)} |" for name, of in contestants.items()]
    lines += ["", "Behind:", "", *head]
    lines += [f"| {name} | {' | '.join(_mean(behind[p]) for p in parts)} |" for name, behind in others.items()]
    lines += ["", "![Value and derivative by rho, in units of its steepest slopes](curves.png)"]
    return "\n".join(lines)


def _mean(found: Sequence[float]) -> str:
    value, low, high = found
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _scores(scores: Mapping[str, Any]) -> str:
    protocol, ours = scores["protocol"], scores["label"]
    others = [name for name in scores["ranking"] if name != ours]
    tasks = list(scores["entries"][ours])
    lines = [
        f"A race over {len(tasks)} tasks ({', '.join(protocol['asked'])}), {protocol['seeds']} seeds each, learning rates "
        f"tuned with {protocol['tuning_runs']} runs per contender and task. Score: normalised test loss over all tasks, "
        "interquartile mean [95 % interval], lower is better. Better and worse: tasks on which the interval of the paired "
        "difference of scores excludes zero.",
        "",
        f"| contender | score | {ours} better / worse than it | diverged |",
        "|---|---|---|---|",
    ]
    for name in scores["ranking"]:
        diverged = sum(entry["diverged"] for entry in scores["entries"][name].values())
        between = "" if name == ours else " / ".join(map(str, _wins(scores["differences"][name])))
        lines.append(f"| {name} | {_interval(scores['aggregate'][name])} | {between} | {diverged} |")
    lines += [
        "",
        "Test losses, and the tuned learning rates:",
        "",
        f"| task | {ours} | {' | '.join(others)} |",
        "|---" * (2 + len(others)) + "|",
    ]
    for task in tasks:
        cells = [_cell(scores["entries"][name][task]) for name in (ours, *others)]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _wins(differences: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """On how many tasks the interval of (ours - theirs) lies below zero, and on how many above."""
    intervals = [(found["low"], found["high"]) for found in differences.values() if found["low"] is not None]
    return sum(high < 0 for _, high in intervals), sum(low > 0 for low, _ in intervals)


def _cell(entry: Mapping[str, Any]) -> str:
    return _interval(entry["loss"]) + ("" if entry["lr"] is None else f", lr {entry['lr']:.2g}")


def _interval(found: Mapping[str, Any]) -> str:
    value, low, high = (
        "∞" if number is None else f"{number:.4g}" for number in (found["iqm"], found["low"], found["high"])
    )
    return value if found["low"] is None else f"{value} [{low}, {high}]"
