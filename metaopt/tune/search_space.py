"""What is searched: dimensions made from a rule's declarations, as Optuna samples them and as the rule takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metaopt.rule import UpdateRule
from metaopt.space import Hyper, Option

if TYPE_CHECKING:
    import optuna


ALL = "all"
"""In place of a name: every hyperparameter with a declared search range."""


@dataclass(frozen=True)
class Dimension:
    """One searched number or choice.

    Attributes:
        label: its name in the study: that of the hyperparameter, ``beta2`` for the second of ``betas``, and ``1-beta2`` where
            what is sampled is one minus it.
        name: of the declared hyperparameter or option.
        entry: which number of a tuple; None where it is none.
        kind: ``log``, ``linear`` or ``decay`` (one minus it on a log scale), ``int`` or ``choice``.
        low, high: ends of the value itself; of numbers.
        choices: of a choice.
        when: (label of a choice, values): searched only where that choice is one of them.
    """

    label: str
    name: str
    entry: int | None
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    when: tuple[str, tuple[Any, ...]] | None = None

    def suggest(self, trial: optuna.Trial) -> Any:
        """Ask the trial for a value of this dimension."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.label, self.choices)
        if self.kind == "int":
            return trial.suggest_int(self.label, int(self.low), int(self.high))
        if self.kind == "decay":
            return 1 - trial.suggest_float(self.label, 1 - self.high, 1 - self.low, log=True)
        return trial.suggest_float(self.label, self.low, self.high, log=self.kind == "log")

    def sampled(self, value: Any) -> Any:
        """The study's number for a value; inverse of `value`."""
        return 1 - value if self.kind == "decay" else value

    def value(self, sampled: Any) -> Any:
        """The rule's value for what the study holds."""
        return 1 - sampled if self.kind == "decay" else sampled


@dataclass(frozen=True)
class SearchSpace:
    """The dimensions of one search, choices first.

    Args:
        dimensions: what is searched.
        defaults: the rule's own values, which fill the other entries of tuples.
    """

    dimensions: tuple[Dimension, ...]
    defaults: Mapping[str, Any]

    @classmethod
    def of_rule(cls, rule: UpdateRule, asked: Sequence[str] = (ALL,)) -> SearchSpace:
        """The space that a rule declares, or the part of it that was asked for.

        Args:
            rule: whose declarations count.
            asked: names of hyperparameters, entries of them (``beta1``) or options; ``lr=1e-4:1e-1`` gives other ends,
                ``ns_steps=1:8`` an option's integers, ``nesterov=False,True`` its choices; `ALL` is every hyperparameter
                with a declared search range.

        Raises:
            ValueError: a name that is not declared, a range outside the domain, or a space without dimensions.
        """
        found: dict[str, Dimension] = {}
        known = list(_declared(rule))
        for text in asked:
            wanted, equals, given = text.partition("=")
            if text == ALL:
                chosen = [item for item in known if isinstance(item[3], Hyper) and item[3].search]
            else:
                chosen = [item for item in known if wanted in (item[0], item[1])]
            if not chosen and text != ALL:
                names = ", ".join(dict.fromkeys(item[1] for item in known))
                raise ValueError(f"{rule.label()} has no hyperparameter or option {wanted!r} to search; it has {names}")
            for label, name, entry, declared in chosen:
                made = _number if isinstance(declared, Hyper) else _option
                found[label] = made(label, name, entry, declared, given if equals else None)  # type: ignore[arg-type]
        if not found:
            raise ValueError(f"{rule.label()} declares no search range; give search=['lr=1e-4:1e-1'] or the like")
        labels = {item.name: item.label for item in found.values() if item.kind == "choice"}
        conditional = [_conditional(item, rule, labels) for item in found.values()]
        dimensions = [item for item in conditional if item is not None]
        return cls(tuple(sorted(dimensions, key=lambda item: item.kind not in ("choice", "int"))), rule.values())

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Ask the trial for a point, conditions included: values of the rule, by declared name."""
        taken: dict[str, Any] = {}
        for item in self.dimensions:
            if item.when is None or taken.get(item.when[0]) in item.when[1]:
                taken[item.label] = item.suggest(trial)
        return self._assembled(taken)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the rule, by declared name, for the parameters of a trial of the study."""
        items = {item.label: item for item in self.dimensions}
        return self._assembled({label: items[label].value(sampled) for label, sampled in params.items()})

    def params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The study's parameters for values of the rule, where they lie in the space; inverse of `values`."""
        found = {}
        for item in self.dimensions:
            if item.name in values:
                value = values[item.name] if item.entry is None else values[item.name][item.entry]
                if value in item.choices or (item.kind != "choice" and item.low <= value <= item.high):
                    found[item.label] = item.sampled(value)
        return found

    def _assembled(self, by_label: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for item in self.dimensions:
            if item.label not in by_label:
                continue
            if item.entry is None:
                values[item.name] = by_label[item.label]
            else:
                whole = list(values.get(item.name, self.defaults[item.name]))
                whole[item.entry] = by_label[item.label]
                values[item.name] = tuple(whole)
        return values

    def to_json(self) -> list[dict[str, Any]]:
        """The dimensions as JSON holds them."""
        return json.loads(json.dumps([vars(item) for item in self.dimensions]))

    @property
    def digest(self) -> str:
        """Names the space: equal for equal dimensions."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _declared(rule: UpdateRule) -> Iterable[tuple[str, str, int | None, Hyper | Option]]:
    """(label, name, entry, declaration) of every number and option; those of tuples as `metaopt.rule.flat_hp` names them."""
    for name, declared in rule.declared().items():
        if isinstance(declared, Hyper) and isinstance(declared.default, tuple):
            for entry in range(len(declared.default)):
                yield f"{name.removesuffix('s')}{entry + 1}", name, entry, declared
        else:
            yield name, name, None, declared


def _number(label: str, name: str, entry: int | None, declared: Hyper, given: str | None) -> Dimension:
    low, high = declared.search or (declared.low, declared.high)
    if given is not None:
        try:
            low, high = map(float, given.split(":"))
        except ValueError:
            raise ValueError(f"the range of {label} must look like {label}=1e-4:1e-1, got {given!r}") from None
    spreads = {"linear": True, "log": low > 0, "decay": high < 1}[declared.scale]
    if not (declared.contains(low) and declared.contains(high) and low < high and spreads):
        if given is None:
            raise ValueError(
                f"{label} declares no range to search; write {label}=LOW:HIGH, inside {declared.domain} on a {declared.scale} "
                f"scale"
            )
        raise ValueError(
            f"the range of {label} must be low < high inside {declared.domain} on a {declared.scale} scale, got {low:g} to "
            f"{high:g}; write {label}=LOW:HIGH"
        )
    shown = f"1-{label}" if declared.scale == "decay" else label
    return Dimension(shown, name, entry, declared.scale, low, high, when=declared.when)


def _option(label: str, name: str, entry: int | None, declared: Option, given: str | None) -> Dimension:
    if given and ":" in given:
        low, _, high = given.partition(":")
        if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
            raise ValueError(f"the integers of {label} must look like {label}=1:8, got {given!r}")
        declared.validate(name, int(low))
        return Dimension(label, name, entry, "int", int(low), int(high))
    choices = declared.choices or ()
    if given:
        named = {str(choice): choice for choice in choices} or {text: int(text) for text in given.split(",")}
        choices = tuple(declared.validate(name, named.get(text, text)) for text in given.split(","))
    if len(choices) < 2:
        raise ValueError(f"option {label} needs at least two values to search; write {label}=A,B or {label}=1:8")
    return Dimension(label, name, entry, "choice", choices=choices)


def _conditional(item: Dimension, rule: UpdateRule, labels: Mapping[str, str]) -> Dimension | None:
    """The dimension with its condition, without it where the option is fixed so that it holds; None where it never does."""
    if item.when is None:
        return item
    option, values = item.when
    if option in labels:
        return Dimension(**{**vars(item), "when": (labels[option], values)})
    return Dimension(**{**vars(item), "when": None}) if rule.values()[option] in values else None
