"""What a user may type where a rule is wanted: a name, his own file, or trained meta-parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.learned import BoundRule, LearnedRule, Theta
from metaopt.rule import UpdateRule
from metaopt.space import Option

THETA_FILE = "theta.safetensors"


def resolve_rule(reference: str | UpdateRule, **arguments: Any) -> UpdateRule:
    """The rule that ``reference`` names.

    Args:
        reference: a registered optimizer (``adamw``); ``file.py:Name`` for a rule of the user's own; or meta-parameters
            written by meta-training: a ``.safetensors`` file, or the directory of the run. A rule is returned as it is.
        **arguments: hyperparameters and options that differ from the defaults.

    Raises:
        ValueError: nothing of that name, or a value outside its domain.
    """
    if isinstance(reference, UpdateRule):
        return reference.replaced(**arguments)
    path = Path(reference)
    if path.suffix == ".safetensors" or (path / THETA_FILE).is_file():
        return load_theta(path).replaced(**arguments)
    if reference in registry.specs("learned_optimizer"):
        raise ValueError(
            f"{reference!r} is a learned optimizer without meta-parameters; meta-train it (metaopt meta-train {reference}) "
            f"and give the run's directory"
        )
    if "/" in reference and ":" not in reference:
        raise ValueError(f"{reference} is no directory of a finished meta-training run: it holds no {THETA_FILE}")
    rule = registry.create("optimizer", reference, **arguments)
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

    Raises:
        ValueError: no such file, or not one that `save_theta` wrote.
    """
    path = Path(path)
    path = path / THETA_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no meta-parameters at {path}; metaopt meta-train writes {THETA_FILE} into its run directory")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        theta = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    if "metaopt" not in metadata:
        raise ValueError(f"{path} does not say which learned optimizer it belongs to; write it with save_theta")
    written = json.loads(metadata["metaopt"])
    return registry.create("learned_optimizer", written["learned_optimizer"], **written["options"]).bind(theta)
