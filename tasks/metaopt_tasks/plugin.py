"""What this plugin offers: workloads and the data that they train on."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl
from metaopt_tasks.data.catalogue import SOURCES
from metaopt_tasks.problems.catalogue import PROBLEMS
from metaopt_tasks.suites import task_specs


@hookimpl
def metaopt_tasks() -> list[Spec]:
    """Families and their named members."""
    rescaled = "any task, in units of its own for each run"
    return [
        *task_specs(),
        Spec("rescaled", "metaopt_tasks.rescaled:RescaledFamily", rescaled, ("family", "augmentation")),
    ]


@hookimpl
def metaopt_data_sources() -> list[Spec]:
    """Data that need no download."""
    return list(SOURCES)


@hookimpl
def metaopt_problems() -> list[Spec]:
    """Bilevel problems."""
    return list(PROBLEMS)
