"""How well candidates are confined, and what they may use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How well a candidate is confined; each one is safer than those before it."""

    LIMITS = 0
    NAMESPACES = 1
    SECCOMP = 2
    FULL = 3

    def __str__(self) -> str:
        return ("rlimits only", "no seccomp", "no namespaces", "full")[self]


@dataclass(frozen=True)
class Limits:
    """What a candidate may use.

    Attributes:
        seconds: wall-clock time of each call, and of reading its source; above 0.
        cpu_seconds: CPU time in all; at least 1.
        megabytes: memory beyond what torch takes; at least 16.

    Raises:
        ValueError: a number out of range.
    """

    seconds: float = 5.0
    cpu_seconds: int = 60
    megabytes: int = 512

    def __post_init__(self) -> None:
        for name, least in (("seconds", 1e-3), ("cpu_seconds", 1), ("megabytes", 16)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} of Limits must be at least {least:g}, got {getattr(self, name)}")
