"""Arguments that name one of a few things."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value``, given for ``name``, is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
