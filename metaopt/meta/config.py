"""What determines a meta-training run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaopt.resolve import hashable
from metaopt.suite import listed, refuse_held_out, refuse_held_out_data

ON_DIVERGENCE = ("exclude", "worst")
JUDGE_SPLITS = ("train", "valid")

SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "constant": lambda progress, final: 1.0,
    "linear": lambda progress, final: 1 + (final - 1) * progress,
    "cosine": lambda progress, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)),
}
"""Factor of the outer learning rate after warm-up, of progress in [0, 1] and the final factor."""


@dataclass(frozen=True)
class TaskChoice:
    """A registered task or family, and what its factory is given."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetaTrainConfig:
    """Everything that determines a meta-training run; saved beside its results.

    Attributes:
        learned, learned_options: the learned optimizer (registered name) and its options.
        tasks: the inner problems: names of tasks and families, ``suite:NAME``, or ``TaskChoice`` (as a mapping ``{"name":
            ..., "options": ...}``) where options differ from the defaults.
        tasks_per_step: so many of them make one outer step, by equal shares; None = all.
        curriculum, curriculum_options: which ones (registered name: ``uniform``, ``regret``).
        resample_every: windows for which a member of a family is kept whose members do not stack.
        estimator, estimator_options: the meta-gradient.
        truncation, truncation_options: the lengths of episodes (registered name).
        horizon: inner steps of an episode where truncation is ``constant``; None = each task's own.
        judge_split: where an estimator judges final parameters (``full_es`` with the recomputed loss): on ``train`` or
            ``valid`` examples.
        on_divergence: ``exclude`` leaves diverged copies out of the mean; for ``worst`` they count as the worst loss.
        outer_steps: updates of theta.
        outer_rule, outer_options, outer_lr: the rule that updates theta, its options (weight decay, betas, ...) and its
            peak learning rate.
        warmup: outer steps of linear warm-up.
        schedule: then ``constant``, ``linear`` or ``cosine``, down to ``final_lr_ratio`` of the peak.
        clip_norm: the meta-gradient is scaled down to this norm; 0 = never.
        ema_decay: theta_ema <- ema_decay theta_ema + (1 - ema_decay) theta; evaluated and exported in place of theta; 0 = off.
        init_theta: a run's directory or a file of meta-parameters to begin with; names that it lacks begin fresh.
        freeze: patterns (``rnn.*``) of names in theta that are neither perturbed nor updated.
        evaluate_every: outer steps between evaluations; 0 = never. The best theta is what the run gives.
        evaluate_on: tasks or ``suite:NAME``, as ``tasks``.
        evaluate_seeds: training runs per task in each evaluation.
        patience: stop after so many evaluations without a new best; 0 = never.
        seed: determines everything else.
        device, backend: where and how the inner runs go.
        checkpoint_every: outer steps between checkpoints.
    """

    learned: str = "small_fc_lopt"
    learned_options: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[str | Mapping[str, Any] | TaskChoice] = ("digits_mlp",)
    tasks_per_step: int | None = None
    curriculum: str = "uniform"
    curriculum_options: Mapping[str, Any] = field(default_factory=dict)
    resample_every: int = 100
    estimator: str = "pes"
    estimator_options: Mapping[str, Any] = field(default_factory=dict)
    truncation: str = "constant"
    truncation_options: Mapping[str, Any] = field(default_factory=dict)
    horizon: int | None = None
    judge_split: str = "train"
    on_divergence: str = "exclude"
    outer_steps: int = 1000
    outer_rule: str = "adam"
    outer_options: Mapping[str, Any] = field(default_factory=dict)
    outer_lr: float = 1e-3
    warmup: int = 20
    schedule: str = "cosine"
    final_lr_ratio: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    init_theta: str | None = None
    freeze: Sequence[str] = ()
    evaluate_every: int = 0
    evaluate_on: Sequence[str | Mapping[str, Any] | TaskChoice] = ()
    evaluate_seeds: int = 2
    patience: int = 0
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_type(f.name, getattr(self, f.name), str(f.type))
        for name in ("tasks", "evaluate_on"):
            object.__setattr__(self, name, _chosen(name, getattr(self, name)))
        for pattern in self.freeze:
            _check_type("a pattern in freeze", pattern, "str")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        for option, setting in (("lr", "outer_lr"), ("horizon", "outer_steps")):
            if option in self.outer_options:
                raise ValueError(
                    f"outer_options must not hold {option!r}, got {self.outer_options[option]!r}; set {setting}"
                )
        least = {
            "resample_every": 1, "outer_steps": 1, "warmup": 0, "clip_norm": 0, "evaluate_every": 0, "evaluate_seeds": 1,
            "patience": 0, "checkpoint_every": 1,
        }  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.outer_lr < math.inf:
            raise ValueError(f"outer_lr must be above 0, got {self.outer_lr}; a usual value is 1e-3")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}; a usual value is 0.99")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}")
        allowed = {"schedule": SCHEDULES, "on_divergence": ON_DIVERGENCE, "judge_split": JUDGE_SPLITS}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_tasks()

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise ValueError("meta-training needs at least one task; see metaopt list tasks")
        if self.tasks_per_step is not None and not 1 <= self.tasks_per_step <= len(self.tasks):
            raise ValueError(f"tasks_per_step must be in [1, {len(self.tasks)}], got {self.tasks_per_step}")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}; it counts inner steps")
        if self.truncation != "constant" and self.horizon is not None:
            raise ValueError(f"truncation {self.truncation!r} has lengths of its own; set them in truncation_options")
        if self.truncation == "constant" and self.truncation_options:
            raise ValueError("truncation 'constant' takes no options; its length is horizon")
        if bool(self.evaluate_every) != bool(self.evaluate_on):
            raise ValueError("evaluate_every and evaluate_on go together; give both, or neither")
        if self.patience and not self.evaluate_every:
            raise ValueError(f"patience counts evaluations, got {self.patience} and none; set evaluate_every")
        for choice in (*self.task_choices, *self.evaluation_choices):
            if "device" in choice.options:
                raise ValueError(
                    f"options of {choice.name} must not hold 'device', got {choice.options['device']!r}; set device for all"
                )
            refuse_held_out([choice.name, *texts_in(choice.options, "task")], "meta-training")
            refuse_held_out_data(texts_in(choice.options, "data"), "meta-training")

    @property
    def task_choices(self) -> tuple[TaskChoice, ...]:
        """``tasks``, with suites replaced by their tasks."""
        return tuple(choice for choice in self.tasks if isinstance(choice, TaskChoice))

    @property
    def evaluation_choices(self) -> tuple[TaskChoice, ...]:
        """``evaluate_on``, likewise."""
        return tuple(choice for choice in self.evaluate_on if isinstance(choice, TaskChoice))

    def lr_at(self, step: int) -> float:
        """The outer learning rate of one step, counted from 0: linear warm-up, then the schedule."""
        if step < self.warmup:
            return self.outer_lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.outer_steps - self.warmup, 1)
        return self.outer_lr * SCHEDULES[self.schedule](progress, self.final_lr_ratio)


def make_config(values: Mapping[str, Any]) -> MetaTrainConfig:
    """A config from values by name, such as a file's or a command line's.

    Raises:
        ValueError: an unknown name, with the nearest one; or a value that is not allowed.
    """
    known = [f.name for f in dataclasses.fields(MetaTrainConfig)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"meta-training has no setting {name!r}; {advice}")
    return MetaTrainConfig(**values)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a TOML file, or of the ``config.json`` of another run, for `make_config`; arrays become tuples.

    Raises:
        ValueError: no such file, or not TOML or JSON.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} to read settings from")
    read, kind = (json.loads, "JSON") if path.suffix == ".json" else (tomllib.loads, "TOML")
    try:
        values = read(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no {kind}: {error}") from error
    return {name: hashable(value) for name, value in values.items()}


def _chosen(name: str, items: Sequence[Any]) -> tuple[TaskChoice, ...]:
    chosen: list[TaskChoice] = []
    for item in items:
        if isinstance(item, str):
            chosen += [TaskChoice(name) for name in listed([item])]
        elif isinstance(item, TaskChoice):
            chosen.append(item)
        elif isinstance(item, Mapping) and "name" in item and item.keys() <= {"name", "options"}:
            chosen.append(TaskChoice(**item))
        else:
            raise ValueError(f"{name} holds names, or mappings with name and options, got {item!r}")
    for choice in chosen:
        _check_type(f"the name of a task in {name}", choice.name, "str")
        _check_type(f"options of {choice.name}", choice.options, "Mapping")
    return tuple(chosen)


_KINDS: Mapping[str, tuple[type | tuple[type, ...], str, str]] = {
    "str": (str, "text", "'cpu'"),
    "int": (int, "an integer", "10"),
    "float": ((int, float), "a number", "0.1"),
    "Mapping": (Mapping, "a table of names and values", "{'pairs': 16}"),
    "Sequence": ((list, tuple), "a list", "['digits_mlp']"),
}
"""Annotation of a setting -> what is accepted, its name, and an example."""


def _check_type(name: str, value: Any, annotation: str) -> None:
    kind = annotation.removesuffix(" | None").partition("[")[0]
    accepted, wanted, example = _KINDS[kind]
    if value is None and annotation.endswith(" | None"):
        return
    if not isinstance(value, accepted) or isinstance(value, bool):
        example = f"[{value!r}]" if kind == "Sequence" and isinstance(value, str) else example
        raise ValueError(f"{name} must be {wanted}, got {value!r}; write {example}")


def texts_in(options: Mapping[str, Any], name: str) -> list[str]:
    """The texts that an option may become, at any depth: a family may hold it among its ranges, or for a task inside."""
    found: list[str] = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            found += texts_in(value, name)
        elif key == name:
            found += [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]
    return found
