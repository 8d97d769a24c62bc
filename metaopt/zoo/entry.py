"""Loading and verifying the entries of a zoo.

An entry is a directory ``<name>/`` with ``theta.safetensors`` (from `metaopt.resolve.save_theta`), ``rule.py`` (from
``metaopt simplify``, with a class ``Champion``) or ``loss.txt`` (a text that `metaopt.program.read_loss` takes), ``card.json``
(`metaopt.zoo.card.Card`) and the page ``README.md`` made of it.
Plugins offer entries through ``metaopt_zoo_rules``.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from metaopt import registry
from metaopt.evaluate.race import description
from metaopt.objective import Objective
from metaopt.program import ProgramObjective, parse_program, read_loss
from metaopt.resolve import THETA_FILE, load_theta, read_theta
from metaopt.rule import ElementwiseRule, UpdateRule
from metaopt.suite import content_hash
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt.zoo.card import PAGE_FILE, LossCard, ProgramCard, WeightsCard, read_card, render

RULE_FILE, RULE_CLASS = "rule.py", "Champion"
LOSS_FILE = "loss.txt"
GOLDEN_RATE = 0.1
"""Of Adam, with which losses are tried: a policy leaves its reference within ten steps."""
_FILES = {WeightsCard: THETA_FILE, ProgramCard: RULE_FILE, LossCard: LOSS_FILE}


def load(directory: Path | str, **values: Any) -> UpdateRule | Objective:
    """The rule or the loss of the entry in ``directory``.

    Weights import nothing but registered learned optimizers. A program is imported, from the entry's own ``rule.py`` and
    nowhere else: it is code of the package that the entry comes with, as its plugin is. A loss is read, never executed.

    Args:
        directory: of the entry.
        **values: hyperparameters and options that differ from the defaults.

    Raises:
        TypeError: a value of something that the entry has not.
        ValueError: its card is not complete, its weights or program are not those of the card, its learned optimizer is not
            installed, or the program is no elementwise rule.
    """
    card = read_card(directory)
    path = Path(directory) / _FILES[type(card)]
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "nothing"
    if found != card.sha256:
        raise ValueError(f"{path} is not what its card describes: sha256 {found}, not {card.sha256}; install it again")
    if isinstance(card, LossCard):
        return _loss(path.read_text(), card, values)
    if not isinstance(card, WeightsCard):
        return cast(UpdateRule, load_program(path).replaced(**values))
    name, options, _ = read_theta(path)
    if name != card.learned_optimizer or json.dumps(options) != json.dumps(card.options):
        raise ValueError(f"{path} belongs to {name} {options}, its card says {card.learned_optimizer} {card.options}")
    registry.get("learned_optimizer", name)  # a registered name: weights may not name code to import
    return cast(UpdateRule, load_theta(path).replaced(**values))


def _loss(text: str, card: LossCard, values: Mapping[str, float]) -> Objective:
    numbers = {**card.hyperparameters, **values}
    unknown = numbers.keys() - card.hyperparameters.keys()
    if unknown:
        raise TypeError(
            f"zoo:{card.name} has no hyperparameter {min(unknown)!r}; it has {', '.join(card.hyperparameters)}"
        )
    program = read_loss(text, tuple(card.inputs), tuple(card.hyperparameters))
    return ProgramObjective(program, card.objective, tuple(numbers.items()))  # type: ignore[arg-type]


def load_program(path: Path) -> ElementwiseRule:
    """The rule of a file that ``metaopt simplify`` wrote, with its defaults; the file is imported.

    Raises:
        ValueError: it cannot be imported, or its ``Champion`` is no elementwise rule.
    """
    kind = registry.load_reference(f"{path}:{RULE_CLASS}")
    if not (isinstance(kind, type) and issubclass(kind, ElementwiseRule)):
        raise ValueError(f"{RULE_CLASS} of {path} is no ElementwiseRule; metaopt simplify writes one")
    return kind()


def verify(directory: Path | str) -> float:
    """Check an entry: its card is complete, its weights, program or loss are the card's, so is its page, and it trains as
    recorded.

    Returns:
        The largest relative difference of a golden loss.

    Raises:
        ValueError: the first thing that is wrong.
    """
    made, card = load(directory), read_card(directory)
    page = Path(directory) / PAGE_FILE
    if not page.is_file() or page.read_text() != render(card):
        raise ValueError(f"{page} is not the page of its card; write metaopt.zoo.render(card) to it")
    if isinstance(card, LossCard) and (Path(directory) / LOSS_FILE).read_text() != card.program:
        raise ValueError(f"{LOSS_FILE} of {card.name} is not the loss on its card, which is\n{card.program}")
    if isinstance(card, ProgramCard):
        rule = cast(UpdateRule, made)
        traced = description(rule)["program"]
        if parse_program(card.program) != parse_program(traced):
            raise ValueError(f"{RULE_FILE} of {card.name} is not the program on its card: traced, it is\n{traced}")
        if rule.hp != card.hyperparameters:
            raise ValueError(
                f"{RULE_FILE} of {card.name} has the hyperparameters {rule.hp}, not {card.hyperparameters}"
            )
    golden = card.golden
    content, losses = golden_losses(made, golden["task"], golden["seed"], len(golden["losses"]))
    if content != golden["content"]:
        raise ValueError(
            f"the golden losses of {card.name} are of task {golden['task']} with content {golden['content']}, "
            f"which is {content} here; its data or architecture have changed"
        )
    smallest = sys.float_info.min  # a loss may be 0
    difference = max(abs(a - b) / max(abs(b), smallest) for a, b in zip(losses, golden["losses"], strict=True))
    if not difference <= golden["rtol"]:
        raise ValueError(
            f"{card.name} does not train as it did: on {golden['task']} its losses are {_shown(losses)}, "
            f"recorded were {_shown(golden['losses'])} (relative difference {difference:.1e}, allowed {golden['rtol']:.0e})"
        )
    return difference


def golden_losses(made: UpdateRule | Objective, task: str, seed: int, steps: int) -> tuple[str, list[float]]:
    """The content hash of a named task, and the first losses [steps] of training it on the CPU.

    Args:
        made: what it is trained with: a rule, or an objective, with Adam.
        task: that takes the objective, if it is one.
        seed: of the run.
        steps: of the run.

    Raises:
        ValueError: no such task, or a loss is not finite.
    """
    own = {} if isinstance(made, UpdateRule) else {"objective": made}
    rule = made if isinstance(made, UpdateRule) else registry.create("optimizer", "adam", lr=GOLDEN_RATE)
    source = registry.create("task", task, device="cpu", **own)
    if not isinstance(source, Task):
        raise ValueError(f"{task!r} is a family of tasks; golden losses are those of one task, for example digits_mlp")
    with torch.no_grad():
        losses, _ = unroll(source, rule, start(source, rule, [seed]), steps, backend="eager")
    found = losses[0].tolist()
    if not all(map(math.isfinite, found)):
        raise ValueError(f"training {task} diverges in the first {steps} steps ({_shown(found)}); choose another task")
    return content_hash(source), found


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{loss:.6g}" for loss in losses)
