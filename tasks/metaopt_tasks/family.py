"""A family of tasks: one factory and the ranges of its arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator

from metaopt.registry import load_reference
from metaopt.task import Task, TaskFamily


@dataclass(frozen=True)
class SampledFamily(TaskFamily):
    """Members differ in their arguments, so in shapes too: each is a task by itself, and they do not stack.

    Attributes:
        name: of the family; members are called ``name-...`` after their arguments' hash.
        factory: ``"module:function"``, which takes the arguments and ``device``, and gives a `Task`.
        ranges: argument -> a list of values, each as likely, or ``{"low": a, "high": b}``: log-uniform between them,
            integers if both are integers; ``"scale": "linear"`` for uniform. ``low`` must be above 0 on a log scale.
        device: of the members.
    """

    name: str
    factory: str
    ranges: Mapping[str, Any] = field(default_factory=dict)
    device: Any = "cpu"

    def sample(self, generator: Generator) -> Task:
        """One member, from a CPU generator."""
        arguments = {name: _draw(values, generator) for name, values in self.ranges.items()}
        return load_reference(self.factory)(name=f"{self.name}-sampled", device=self.device, **arguments)


def _draw(values: Any, generator: Generator) -> Any:
    if not isinstance(values, Mapping):
        return values[int(torch.randint(len(values), (), generator=generator))]
    low, high = values["low"], values["high"]
    share = float(torch.rand((), generator=generator, dtype=torch.float64))
    whole = isinstance(low, int) and isinstance(high, int)
    top = high + 1 if whole else high
    drawn = (
        low + share * (top - low) if values.get("scale") == "linear" else low * math.exp(share * math.log(top / low))
    )
    return min(int(drawn), high) if whole else drawn
