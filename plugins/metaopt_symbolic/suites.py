"""What a search trains on: suites of small dense networks."""

from __future__ import annotations

import difflib
from typing import Any

from metaopt import registry
from metaopt.suite import listed, refuse_held_out
from metaopt.task import Task

SUITES: dict[str, dict[str, dict[str, Any]]] = {
    # 300 to 2,500 parameters: classification and regression, with activations, depths, inits and conditions of many kinds; the
    # first ones rank programs most as all of them together do
    "search": {
        "mixtures_silu": {"task": "mixtures_16d_mlp", "hidden": (24, 24), "activation": "silu", "batch_size": 32},
        "digits_2layer": {"task": "digits_mlp", "hidden": (16, 16), "batch_size": 64},
        "shapes_small_init": {"task": "shapes8_mlp", "hidden": (16,), "activation": "gelu", "init_scale": 0.3},
        "teacher_relu": {"task": "teacher_32d_mlp", "hidden": (24,), "activation": "relu", "batch_size": 32},
        "digits_tanh": {"task": "digits_mlp", "hidden": (16,), "activation": "tanh", "batch_size": 32},
        "ill_conditioned": {
            "task": "digits_mlp", "data": "ill_conditioned_classes", "hidden": (16, 16), "activation": "elu", "batch_size": 32,
        },
    },
    # tasks of the suite train as they are: other data, batches and conditions, for longer searches
    "broad": {
        "mixtures_16d": {"task": "mixtures_16d_mlp"},
        "digits_batch8": {"task": "digits_mlp_batch8"},
        "teacher_32d": {"task": "teacher_32d_mlp"},
        "spirals": {"task": "spirals_mlp"},
        "iris": {"task": "iris_mlp"},
        "mnist1d": {"task": "mnist1d_mlp"},
        "teacher": {"task": "teacher_mlp"},
        "wine": {"task": "wine_mlp"},
        "digits_orthogonal": {"task": "digits_mlp_orthogonal"},
        "teacher_2d_sin": {"task": "teacher_2d_mlp_sin"},
    },
    # targets with Student's t noise, so gradients with heavy tails: tuned Lion beats tuned AdamW (benchmarks/sign_regime.py)
    "sign": {
        "outliers_4d_silu": {
            "task": "teacher_4d_mlp_batch8", "hidden": (24, 24), "batch_size": 32, "noise_freedom": 1.5,
        },
        "outliers_8d_tanh": {
            "task": "teacher_8d_mlp", "activation": "tanh", "batch_size": 32, "noise_freedom": 1.5,
        },
        "outliers_32d_gelu": {
            "task": "teacher_32d_mlp", "hidden": (16,), "activation": "gelu", "batch_size": 64, "noise_freedom": 1.5,
        },
        "outliers_64d_relu": {
            "task": "teacher_8d_mlp", "data": "teacher_64d", "hidden": (8,), "batch_size": 64, "noise_freedom": 1.5,
        },
    },
}  # fmt: skip
"""Suite -> name of the task -> the registered task that it is, under ``task``, and its options."""


def tasks_of(suite: str, wider: int = 1, device: str = "cpu") -> dict[str, Task]:
    """The tasks of a suite on ``device``, by name; their hidden layers are ``wider`` times as wide.

    Raises:
        ValueError: no such suite.
    """
    if suite not in SUITES:
        raise ValueError(f"no suite of a search is called {suite!r}; there are {', '.join(SUITES)}")
    made = {}
    for name, declared in SUITES[suite].items():
        options = dict(declared)
        task = options.pop("task")
        hidden = options.pop("hidden", registry.get("task", task).defaults["hidden"])
        options["hidden"] = tuple(wider * width for width in hidden)
        made[name] = registry.create("task", task, name=name, device=device, **options)
    return made


def search_tasks(text: str, device: str = "cpu") -> dict[str, Task]:
    """The tasks that ``text`` names, made on ``device``.

    Names are of suites of this module, of registered tasks, and ``suite:NAME``, with commas between them.

    Raises:
        ValueError: nothing of that name, a task of the held-out suite, or a family of tasks.
    """
    parts = _parts(text)
    refuse_held_out(parts, "a search")
    made: dict[str, Task] = {}
    for part in parts:
        made |= tasks_of(part, device=device) if part in SUITES else {part: _registered(part, device)}
    if not made:
        raise ValueError("a search needs at least one task, got none")
    return made


def _parts(text: str) -> list[str]:
    """Suites of this module and names of tasks."""
    parts: list[str] = []
    for part in map(str.strip, text.split(",")):
        parts += [part] if part in SUITES else listed([part])
    return parts


def _registered(name: str, device: str) -> Task:
    close = difflib.get_close_matches(name, SUITES, 1)
    if close and name not in registry.specs("task"):
        raise ValueError(f"no suite of a search and no task is called {name!r}; did you mean {close[0]!r}?")
    task = registry.create("task", name, device=device)
    if not isinstance(task, Task):
        raise ValueError(f"{name} is a family of tasks; a search takes tasks (metaopt list tasks)")
    return task


def task_choices(text: str) -> list[dict[str, Any]]:
    """What the tasks of `search_tasks` are made of: ``name`` of the registered task, and ``options``."""
    return [
        {"name": declared["task"], "options": {key: value for key, value in declared.items() if key != "task"}}
        for part in _parts(text)
        for declared in SUITES.get(part, {part: {"task": part}}).values()
    ]
