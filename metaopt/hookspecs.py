"""What a plugin can add to metaopt: the platform's table of contents.

A plugin is a module named by an entry point of the group ``metaopt``. It implements any of these hooks with
``@metaopt.hookimpl``; each returns light `Spec` records whose ``factory`` is a string, so that listing imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("metaopt")
hookimpl = pluggy.HookimplMarker("metaopt")


@dataclass(frozen=True)
class Spec:
    """One thing that a plugin offers.

    Attributes:
        name: unique among its kind; what users type.
        factory: ``"package.module:attribute"``, imported when first used; called with ``defaults`` and the user's arguments.
        summary: one line.
        tags: for filtering, such as ``("elementwise",)``.
        paper: reference with year.
        defaults: keyword arguments that this name adds to the factory.
        extra: the ``pip install 'torch-metaopt[extra]'`` that its imports need, if any.
        facts: what is known of it without importing it. Tasks: ``family``, ``suite``, ``data`` (its source), and as
            measured ``parameters``, ``bytes``, ``ms_per_step``, ``content`` (hash). Data sources: ``license``.
    """

    name: str
    factory: str
    summary: str = ""
    tags: tuple[str, ...] = ()
    paper: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extra: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@hookspec
def metaopt_optimizers() -> list[Spec]:  # type: ignore[empty-body]
    """Hand-designed update rules: factories give an `metaopt.rule.UpdateRule`."""


@hookspec
def metaopt_learned_optimizers() -> list[Spec]:  # type: ignore[empty-body]
    """Learned optimizers: factories give a `metaopt.learned.LearnedRule`."""


@hookspec
def metaopt_tasks() -> list[Spec]:  # type: ignore[empty-body]
    """Workloads: factories take ``device`` and give a `metaopt.task.Task` or `metaopt.task.TaskFamily`."""


@hookspec
def metaopt_problems() -> list[Spec]:  # type: ignore[empty-body]
    """Bilevel problems: factories give a `metaopt.tune.problem.BilevelProblem`."""


@hookspec
def metaopt_data_sources() -> list[Spec]:  # type: ignore[empty-body]
    """Data sets: factories take ``device`` and give ``{"train": Split, "valid": Split, "test": Split}``."""


@hookspec
def metaopt_objectives() -> list[Spec]:  # type: ignore[empty-body]
    """Losses: factories give a `metaopt.objective.Objective`; the first tag is its kind."""


@hookspec
def metaopt_estimators() -> list[Spec]:  # type: ignore[empty-body]
    """Meta-gradient estimators: factories give a `metaopt.meta.estimator.GradientEstimator`."""


@hookspec
def metaopt_hypergradients() -> list[Spec]:  # type: ignore[empty-body]
    """Ways to differentiate a training run: factories give a `metaopt.tune.hypergradient.Method`."""


@hookspec
def metaopt_truncations() -> list[Spec]:  # type: ignore[empty-body]
    """Lengths of the episodes of meta-training: factories give a `metaopt.meta.truncation.TruncationSchedule`."""


@hookspec
def metaopt_curricula() -> list[Spec]:  # type: ignore[empty-body]
    """Choices of the tasks of an outer step: factories give a `metaopt.meta.curriculum.Curriculum`."""


@hookspec
def metaopt_unroll_backends() -> list[Spec]:  # type: ignore[empty-body]
    """Ways to run K inner steps at once: factories take ``step``, an `metaopt.inner_step.InnerStep`."""


@hookspec
def metaopt_kernels() -> list[Spec]:  # type: ignore[empty-body]
    """Fused passes, each named like its kind of device (``torch.device.type``): factories give a `metaopt.kernels.Kernels`."""


@hookspec
def metaopt_proposers() -> list[Spec]:  # type: ignore[empty-body]
    """Sources of candidates for a search."""


@hookspec
def metaopt_importers() -> list[Spec]:  # type: ignore[empty-body]
    """Readers of meta-parameters that other projects trained, each named like the learned optimizer that it reads.

    Factories take ``path`` and options of the learned optimizer, and give a `metaopt.learned.BoundRule`.
    """


@hookspec
def metaopt_exporters() -> list[Spec]:  # type: ignore[empty-body]
    """Ways to write a rule as a file that needs only torch: factories give ``write(rule, name, path)``."""


@hookspec
def metaopt_zoo_rules() -> list[Spec]:  # type: ignore[empty-body]
    """Published rules and losses, used as ``zoo:NAME``: what `metaopt.zoo.entries` gives of a directory with their cards."""


@hookspec
def metaopt_commands() -> list[Spec]:  # type: ignore[empty-body]
    """Commands of ``metaopt``: factories are functions, or a ``typer.Typer`` with several, in modules that import no torch."""
