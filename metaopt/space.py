"""Hyperparameter declarations: the one place where a default, a domain and a scale are written.

From a declaration come the constructor and its validation, the learning-rate grid of a race, the search space
of a tuner, the columns of the documentation and the arguments of an exported class. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scale = Literal["linear", "log", "decay"]
"""How values spread: evenly; evenly in log(x); or, for EMA decays, evenly in log(1 - x)."""


@dataclass(frozen=True)
class Hyper:
    """A continuous hyperparameter: a float (or tensor at run time), or a tuple of them with one domain.

    Attributes:
        default: the value used when none is given; a tuple declares as many numbers as it has entries.
        low, high: the domain, inclusive unless ``open_low`` / ``open_high``.
        scale: how to spread a grid or a search over it.
        search: (low, high) worth searching; a part of the domain.
        doc: one line of meaning.
        when: (option, values): it means something only where that option has one of these values.
    """

    default: float | tuple[float, ...]
    low: float = -math.inf
    high: float = math.inf
    scale: Scale = "linear"
    open_low: bool = False
    open_high: bool = False
    search: tuple[float, float] | None = None
    doc: str = ""
    when: tuple[str, tuple[Any, ...]] | None = None

    @property
    def domain(self) -> str:
        """The domain as text, such as ``[0, 1)``."""
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def contains(self, value: float) -> bool:
        """Whether one number lies in the domain (NaN and infinity never do)."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below and math.isfinite(value))

    def validate(self, name: str, value: Any) -> Any:
        """Return ``value`` as float or tuple of floats; tensors pass, checked entry by entry.

        Raises:
            TypeError: the value is no number, or a tuple of the wrong length.
            ValueError: it lies outside the domain.
        """
        if isinstance(self.default, tuple):
            if not isinstance(value, (tuple, list)) or len(value) != len(self.default):
                raise TypeError(
                    f"{name} must be {len(self.default)} numbers in {self.domain}, got {value!r}; "
                    f"for example {name}={self.default}"
                )
            return tuple(self._validate_one(f"{name}[{i}]", v) for i, v in enumerate(value))
        return self._validate_one(name, value)

    def _validate_one(self, name: str, value: Any) -> Any:
        if hasattr(value, "detach"):  # a tensor: one value per copy, or one that is differentiated
            worst = [float(value.detach().min()), float(value.detach().max())] if value.numel() else []
            for number in worst:
                self._require(name, number)
            return value
        if isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
            raise TypeError(f"{name} must be a number in {self.domain}, got {value!r}; for example {self.default!r}")
        number = float(value)
        self._require(name, number)
        return number

    def _require(self, name: str, number: float) -> None:
        if not self.contains(number):
            raise ValueError(f"{name} must be in {self.domain}, got {number:g}; the default is {self.default!r}")

    def grid(self, points: int) -> list[float]:
        """``points`` values spread over ``search`` (or the finite domain) on this scale.

        Raises:
            ValueError: neither a search range nor a domain that can be spread over was declared, or ``points`` < 1.
        """
        low, high = self.search or (self.low, self.high)
        if points < 1:
            raise ValueError(f"a grid needs at least 1 point, got {points}")
        spreads = {"linear": True, "log": low > 0, "decay": high < 1}[self.scale]
        if not (self.contains(low) and self.contains(high) and spreads):
            raise ValueError(
                f"a grid on a {self.scale} scale needs a range with both ends, but only {self.domain} is declared; "
                f"give search=(low, high)"
            )
        if points == 1:
            return [low if self.scale == "linear" else math.sqrt(low * high)]
        steps = [i / (points - 1) for i in range(points)]
        if self.scale == "log":
            return [low * (high / low) ** s for s in steps]
        if self.scale == "decay":
            return [1 - (1 - low) * ((1 - high) / (1 - low)) ** s for s in steps]
        return [low + (high - low) * s for s in steps]


@dataclass(frozen=True)
class Option:
    """A choice that shapes the rule itself (a flag, a number of iterations): never a tensor, never searched by gradient."""

    default: Any
    choices: tuple[Any, ...] | None = None
    low: int | None = None
    doc: str = ""

    def validate(self, name: str, value: Any) -> Any:
        """Return ``value``, or raise ``ValueError`` naming the allowed ones."""
        if self.choices is not None and value not in self.choices:
            raise ValueError(
                f"{name} must be one of {list(self.choices)}, got {value!r}; the default is {self.default!r}"
            )
        if self.low is not None and (not isinstance(value, int) or isinstance(value, bool) or value < self.low):
            raise ValueError(
                f"{name} must be an integer of at least {self.low}, got {value!r}; the default is {self.default!r}"
            )
        return value


def hyper(
    default: float | tuple[float, ...],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    scale: Scale = "linear",
    open_low: bool = False,
    open_high: bool = False,
    search: tuple[float, float] | None = None,
    doc: str = "",
    when: tuple[str, tuple[Any, ...]] | None = None,
) -> Any:
    """Declare a hyperparameter as a dataclass field; see `Hyper` for the arguments."""
    declaration = Hyper(default, low, high, scale, open_low, open_high, search, doc, when)
    return field(default=default, metadata={"metaopt": declaration})


def option(default: Any, *, choices: tuple[Any, ...] | None = None, low: int | None = None, doc: str = "") -> Any:
    """Declare a structural choice as a dataclass field; see `Option` for the arguments."""
    return field(default=default, metadata={"metaopt": Option(default, choices, low, doc)})


def learning_rate(default: float, *, search: tuple[float, float]) -> Any:
    """Declare ``lr`` in [0, inf), searched on a log scale; 0 is allowed because warm-up schedules start there."""
    return hyper(default, 0.0, scale="log", search=search, doc="learning rate")


def declarations(cls: type) -> dict[str, Hyper | Option]:
    """The declared hyperparameters and options of a dataclass, in order."""
    found = {f.name: f.metadata.get("metaopt") for f in dataclasses.fields(cls)}
    return {name: declared for name, declared in found.items() if declared is not None}


def validate_all(declared: Mapping[str, Hyper | Option], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Validate ``values`` against ``declared``.

    Raises:
        TypeError: a name that is not declared, with the nearest ones.
        ValueError: a value outside its domain.
    """
    for name in values:
        if name not in declared:
            raise TypeError(f"{owner} has no hyperparameter or option {name!r}; it has {', '.join(declared) or 'none'}")
    return {name: declared[name].validate(name, value) for name, value in values.items()}
