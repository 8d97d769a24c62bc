"""What a user may type where a rule is wanted: a name, his own file, trained meta-parameters, or an entry of a zoo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.learned import BoundRule, LearnedRule, Theta
from metaopt.rule import UpdateRule
from metaopt.space import Option

THETA_FILE = "theta.safetensors"
SETTINGS_FORMAT = 1
"""Of the files with a tuned rule's settings that ``metaopt tune`` writes."""


def resolve_rule(reference: str | UpdateRule, **arguments: Any) -> UpdateRule:
    """The rule that ``reference`` names.

    Args:
        reference: a registered optimizer (``adamw``); ``file.py:Name`` for a rule of the user's own; meta-parameters written
            by meta-training: a ``.safetensors`` file, or the directory of the run; settings found by ``metaopt tune``: its
            ``best.json``; or ``zoo:NAME``, an entry of an installed zoo (``metaopt zoo list``). A rule is returned as it is.
        **arguments: hyperparameters and options that differ from the defaults.

    Raises:
        ValueError: nothing of that name, or a value outside its domain.
        TypeError: something else than a rule or text, such as a class or a learned rule without meta-parameters.
    """
    if isinstance(reference, UpdateRule):
        return reference.replaced(**arguments)
    if isinstance(reference, LearnedRule):
        raise TypeError(
            f"{reference.label()} has no meta-parameters; give learned.bind(theta), as of learned.init_theta(...)"
        )
    if not isinstance(reference, str):
        raise TypeError(
            f"an optimizer is made of a rule, such as AdamW(), or a name, such as 'adamw', got {reference!r}"
        )
    if reference.startswith(registry.ZOO):
        return _checked(reference, registry.create("optimizer", reference, **arguments))
    path = Path(reference)
    if path.suffix == ".json":
        return load_settings(path).replaced(**arguments)
    if path.suffix == ".safetensors" or (path / THETA_FILE).is_file():
        return load_theta(path).replaced(**arguments)
    if reference in registry.specs("learned_optimizer"):
        raise ValueError(
            f"{reference!r} is a learned optimizer without meta-parameters; meta-train it (metaopt meta-train {reference}) "
            f"and give the run's directory, or bind random ones: learned = metaopt.create('learned_optimizer', {reference!r}); "
            "rule = learned.bind(learned.init_theta(torch.Generator()))"
        )
    if reference in registry.specs("zoo_rule") and reference not in registry.specs("optimizer"):
        raise ValueError(f"{reference!r} is an entry of a zoo; write {registry.ZOO + reference!r}")
    if "/" in reference and ":" not in reference:
        raise ValueError(f"{reference} is no directory of a finished meta-training run: it holds no {THETA_FILE}")
    return _checked(reference, registry.create("optimizer", reference, **arguments))


def _checked(reference: str, rule: Any) -> UpdateRule:
    if not isinstance(rule, UpdateRule):
        raise ValueError(f"{reference!r} gives a {type(rule).__name__}, not an UpdateRule; see metaopt list optimizers")
    return rule


def save_theta(path: Path | str, name: str, learned: LearnedRule, theta: Theta) -> Path:
    """Write meta-parameters with the name and options of their learned rule; `load_theta` needs nothing else."""
    declared = learned.declared()
    options = {key: value for key, value in learned.values().items() if isinstance(declared[key], Option)}
    # one key: safetensors writes several in random order, and equal runs must give equal files
    metadata = {"metaopt": json.dumps({"learned_optimizer": name, "options": options})}
    tensors = {key: value.detach().cpu().contiguous() for key, value in theta.items()}
    return write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_theta(path: Path | str) -> BoundRule:
    """A learned rule bound to meta-parameters from `save_theta` (a file, or a run directory that holds one).

    Where the learned optimizer is the user's own (``file.py:Name``), the file names that, and it is imported: load such a
    file only from whom you trust. An entry of a zoo may name registered ones only.

    Raises:
        ValueError: no such file, not one that `save_theta` wrote, or one that does not fit its learned optimizer.
    """
    name, options, theta = read_theta(path)
    # a file of numbers may name a class to import, and nothing to call that is not a learned rule
    kind = registry.load("learned_optimizer", name)
    if ":" in name and not (isinstance(kind, type) and issubclass(kind, LearnedRule)):
        raise ValueError(f"{path} names {name!r}, which is no learned rule")
    learned: LearnedRule = registry.create("learned_optimizer", name, **options)
    wanted = {key: tuple(value.shape) for key, value in learned.init_theta(torch.Generator()).items()}
    found = {key: tuple(value.shape) for key, value in theta.items()}
    if found != wanted:
        odd = min(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise ValueError(
            f"the meta-parameters at {path} do not fit {name}: {odd} is {found.get(odd, 'absent')}, expected "
            f"{wanted.get(odd, 'none')}; they were written by another version of it"
        )
    return learned.bind({key: theta[key] for key in wanted})  # a file keeps them in another order


def read_theta(path: Path | str) -> tuple[str, dict[str, Any], Theta]:
    """Name and options of the learned optimizer, and its meta-parameters, from a file of `save_theta` or its directory.

    Raises:
        ValueError: no such file, or not one that `save_theta` wrote.
    """
    path = Path(path)
    path = path / THETA_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no meta-parameters at {path}; metaopt meta-train writes {THETA_FILE} into its run directory")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            theta = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); write it with save_theta") from None
    if "metaopt" not in metadata:
        raise ValueError(f"{path} does not say which learned optimizer it belongs to; write it with save_theta")
    written = json.loads(metadata["metaopt"])
    options = {key: hashable(value) for key, value in written["options"].items()}
    return written["learned_optimizer"], options, theta


def load_settings(path: Path | str) -> UpdateRule:
    """The rule with the settings that ``metaopt tune`` found (its ``best.json``).

    Raises:
        ValueError: no such file, not one of ``metaopt tune``, or one whose optimizer or values do not fit.
    """
    try:
        written = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"no settings at {path} ({error}); metaopt tune writes best.json") from None
    if not isinstance(written, dict) or written.get("format") != SETTINGS_FORMAT or "optimizer" not in written:
        raise ValueError(f"{path} holds no settings of this version's metaopt tune, which writes best.json")
    return wrapped(resolve_rule(written["optimizer"]), written["wrappers"]).replaced(
        **{name: hashable(value) for name, value in written["values"].items()}
    )


def wrapped(rule: UpdateRule, wrappers: Sequence[str]) -> UpdateRule:
    """``rule`` inside registered optimizers that take one as ``rule``, the first of them innermost."""
    for name in wrappers:
        rule = _checked(name, registry.create("optimizer", name, rule=rule))
    return rule


def hashable(value: Any) -> Any:
    """Lists become tuples, at any depth: JSON and TOML know no tuples, and options are never lists."""
    if isinstance(value, dict):
        return {key: hashable(item) for key, item in value.items()}
    return tuple(map(hashable, value)) if isinstance(value, list) else value
