"""A tree shaker: from a rule object to the text of everything that its ``init`` and ``update`` reach.

Classes are written without the machinery of declarations: a rule's options and parts become attributes that a plain
``__init__`` sets, base classes keep only the methods that are reached, and an `ElementwiseRule` gets its
``update_tensor`` from its Program. Code is copied as it was written, less its annotations.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from metaopt.export.elementwise import GUARDS, call_lines, slot_values, update_function
from metaopt.export.names import Definition, Names, is_platform
from metaopt.export.rewrite import ExportError, SelfUses, quoted, self_uses
from metaopt.learned import LearnedRule
from metaopt.program.ops import MATRIX_OPS
from metaopt.rule import Declared, ElementwiseRule, TensorRule, UpdateRule
from metaopt.space import Hyper

_MACHINERY = (object, Declared, UpdateRule, LearnedRule, ElementwiseRule)
_CONTRACT = ("init", "update", "transform", "init_tensor", "update_tensor")


@dataclass(eq=False)
class _Kind:
    """A class of rules as the file will have it: a class of the rule's own, with the instances seen of it."""

    cls: type
    name: str
    instances: list[Declared]
    function: str = ""  # of an ElementwiseRule: the name of its printed update
    reached: set[str] = field(default_factory=set)
    fields: list[str] = field(default_factory=list)
    own: dict[str, str] = field(default_factory=dict)  # members that belong to no class but this kind

    @cached_property
    def mro(self) -> list[type]:
        """The classes whose code is copied."""
        return [c for c in self.cls.__mro__ if c not in _MACHINERY and c.__module__ not in ("abc", "typing")]

    @property
    def is_elementwise(self) -> bool:
        """Whether the update is printed from a Program."""
        return issubclass(self.cls, ElementwiseRule)

    @property
    def ordered_fields(self) -> list[str]:
        """What ``__init__`` takes, as declared."""
        declared = [f.name for f in fields(self.cls) if f.name in self.fields]
        return [*declared, *sorted(set(self.fields) - set(declared))]


class Bundle:
    """The code that one rule reaches, and the expression that makes the rule.

    Args:
        rule: what to write.
        reserved: names that the surrounding file uses itself.
        also: functions and classes that the surrounding file calls.
        told: a class whose docstring the surrounding file has, and where.

    Raises:
        ExportError: something that the rule reaches cannot be part of one file.
    """

    def __init__(self, rule: UpdateRule, reserved: Iterable[str], also: Iterable[Any], told: tuple[type, str]) -> None:
        self.told = told
        self.tensors: dict[str, Tensor] = {}
        self.needs: set[str] = set()
        self._kinds: list[_Kind] = []
        self._members: dict[type, dict[str, str]] = {}
        self._method_uses: dict[tuple[type, str], SelfUses] = {}
        self._loose: set[str] = set()
        roots = {type(part).__module__.split(".")[0] for part in _all_parts(rule)}
        self.names = Names(self, {*reserved, told[1], *MATRIX_OPS}, roots)
        self.names.copy(also)
        kind = self.kind_of(rule)
        for entry in ("init", "update"):
            self.reach(kind, entry)
        while self._reach_loose():
            pass
        self.expression = self._construct(rule, top=True)
        for kind in self._kinds:
            self._define(kind)
        self.names.define_instances()

    @property
    def imports(self) -> set[str]:
        """Import statements."""
        return self.names.imports

    def source(self) -> str:
        """All definitions, each after what it needs when it is executed."""
        return "\n\n\n".join(self.names.ordered())

    # --- reachability ---------------------------------------------------------------------------------------------

    def kind_of(self, rule: Declared) -> _Kind:
        """The kind of an instance, made when first seen."""
        printed = isinstance(rule, ElementwiseRule)
        for kind in self._kinds:
            same_program = not printed or _options(rule) == _options(kind.instances[0])
            if kind.cls is type(rule) and same_program:
                if not any(rule is seen for seen in kind.instances):
                    kind.instances.append(rule)
                    for attribute in kind.fields:
                        self._follow(getattr(rule, attribute))
                return kind
        kind = _Kind(type(rule), self.names.claim(type(rule).__name__, f"{type(rule).__name__}Rule"), [rule])
        self._kinds.append(kind)
        return kind

    def reach(self, kind: _Kind, attribute: str) -> None:
        """Make one attribute of a kind part of the file, with all that it reaches."""
        if attribute in kind.reached:
            return
        kind.reached.add(attribute)
        owner = next((c for c in kind.mro if attribute in vars(c)), None)
        if kind.is_elementwise and attribute in ("update_tensor", "init_tensor") and owner in (None, TensorRule):
            self._print_elementwise(kind, attribute)
            return
        is_field = any(attribute == f.name for f in fields(kind.cls))
        member = vars(owner)[attribute] if owner else None
        makes_part = _makes_part(kind.instances[0], member, attribute)
        if owner is not None and not is_field and _function(member) is not None and not makes_part:
            self._method(kind, owner, attribute)
        elif makes_part or any(attribute in vars(rule) for rule in kind.instances):
            kind.fields.append(attribute)
            for rule in kind.instances:
                self._follow(getattr(rule, attribute))
        elif owner is None and _function(getattr(kind.cls, attribute, None)) is not None:
            raise ExportError(
                f"{kind.cls.__name__} uses self.{attribute}, a part of metaopt's declarations that no exported file has"
            )
        elif hasattr(kind.cls, attribute):
            value = self._value(getattr(kind.cls, attribute), f"{kind.cls.__name__}.{attribute}")
            self._place(kind, owner)[attribute] = f"{attribute} = {value}"
        else:
            raise ExportError(f"{kind.cls.__name__} uses self.{attribute}, which it does not have")

    def _method(self, kind: _Kind, owner: type, attribute: str) -> None:
        place = self._place(kind, owner)
        if (owner, attribute) not in self._method_uses or attribute not in place:
            function = _function(vars(owner)[attribute])
            assert function is not None
            text = self.names.function_text(function, f"{owner.__name__}.{attribute}")
            self._method_uses[owner, attribute] = self_uses(text)
            place[attribute] = text
        found = self._method_uses[owner, attribute]
        self._loose |= found.others
        for chain in sorted(found.chains):
            self._chain(kind, chain)
        for name in sorted(found.supers):
            following = kind.mro[kind.mro.index(owner) + 1 :]
            base = next((c for c in following if name in vars(c)), None)
            if base is None or kind.is_elementwise:
                raise ExportError(
                    f"{owner.__name__}.{attribute} calls super().{name}, which is metaopt's own machinery; write it out"
                )
            self._method(kind, base, name)

    def _place(self, kind: _Kind, owner: type | None) -> dict[str, str]:
        """Where a member goes: what is printed of an elementwise rule belongs to its kind, all else to its class."""
        if owner is None or (kind.is_elementwise and owner is not TensorRule):
            return kind.own
        return self._members.setdefault(owner, {})

    def _chain(self, kind: _Kind, chain: tuple[str, ...]) -> None:
        first, *rest = chain
        self.reach(kind, first)
        if rest and first in kind.fields:
            for rule in kind.instances:
                part = getattr(rule, first)
                if isinstance(part, Declared):
                    self._chain(self.kind_of(part), tuple(rest))

    def _follow(self, value: Any) -> None:
        """Parts within a field."""
        if isinstance(value, Declared):
            self.kind_of(value)
        elif isinstance(value, (tuple, list)):
            for entry in value:
                self._follow(entry)

    def _reach_loose(self) -> bool:
        """Methods of parts that are called on something other than ``self``: told apart by their names alone."""
        before = sum(len(kind.reached) for kind in self._kinds), len(self._kinds)
        for kind in list(self._kinds):
            for name in sorted(self._loose):
                own = any(name in vars(c) and _function(vars(c)[name]) for c in kind.mro)
                ambiguous = any(hasattr(t, name) for t in (Tensor, dict, list, tuple, str, torch))
                if own and (name in _CONTRACT or not ambiguous):
                    self.reach(kind, name)
        return before != (sum(len(kind.reached) for kind in self._kinds), len(self._kinds))

    # --- elementwise rules ----------------------------------------------------------------------------------------

    def _print_elementwise(self, kind: _Kind, attribute: str) -> None:
        rule = kind.instances[0]
        assert isinstance(rule, ElementwiseRule)
        if attribute == "update_tensor":
            kind.own[attribute] = self._update_tensor(kind, rule)
            return
        values = slot_values(rule, hp="self")
        entries = []
        for slot in rule.slots:
            known = values and "self[" not in values[slot]
            if not known:
                self.reach(kind, "init_slot")
            entries.append(f'"{slot}": {values[slot] if values and known else f"self.init_slot({slot!r}, param)"}')
        lines = [f"    {entry}," for entry in entries]
        body = [f"return {{{', '.join(entries)}}}"] if sum(map(len, entries)) < 90 else ["return {", *lines, "}"]
        kind.own[attribute] = _function_text("init_tensor", "self, param, info", "Initial state of one tensor.", body)

    def _update_tensor(self, kind: _Kind, rule: ElementwiseRule) -> str:
        if rule.program.reach == "tree":
            raise ExportError(f"{kind.cls.__name__} couples all tensors; within another rule it cannot be exported")
        kind.function = self.names.claim(f"{kind.name.lower()}_update")
        source, guards = update_function(rule, kind.function)
        self.names.define(Definition(kind.function, source, "function"))
        for guard in guards:
            self.names.define(Definition(f"_{guard}", GUARDS[guard], "function"))
        self.names.copy(MATRIX_OPS[op].plain for op in sorted(rule.program.matrix_ops))
        targets = ", ".join(["new_param", *(f"new_{slot}" for slot in rule.slots)])
        call = call_lines(rule, kind.function, targets, ["param", "grad", *_entries(rule.slots)], "hp", "float(t)")
        items = ", ".join(f'"{slot}": new_{slot}' for slot in rule.slots)
        body = [*call, f"return new_param, {{{items}}}"]
        arguments = "self, grad, slots, param, hp, t, info"
        return _function_text("update_tensor", arguments, "One step of one tensor.", body)

    # --- writing --------------------------------------------------------------------------------------------------

    def _define(self, kind: _Kind) -> None:
        """The class of a kind, after its bases."""
        own = dict(kind.own)
        if kind.fields:
            body = [f"self.{name} = {name}" for name in kind.ordered_fields]
            own = {"__init__": _function_text("__init__", ", ".join(["self", *kind.ordered_fields]), "", body), **own}
        if kind.is_elementwise:
            bases = [c for c in kind.mro if c in self._members]
        else:
            bases = self._kept_bases(kind.cls)
            own |= self._members.get(kind.cls, {})
        self._define_class(kind.name, kind.cls, bases, own)

    def _kept_bases(self, cls: type) -> list[type]:
        kept: list[type] = []
        for base in cls.__bases__:
            for candidate in [base] if base in self._members else self._kept_bases(base):
                if candidate not in kept:
                    kept.append(candidate)
        return kept

    def _define_class(self, name: str, cls: type, bases: list[type], members: dict[str, str]) -> None:
        base_names = []
        for base in bases:
            base_name = self.names.class_name(base, (kind.name for kind in self._kinds if kind.cls is base))
            base_names.append(base_name)
            if not self.names.is_defined(base_name) and not any(kind.cls is base for kind in self._kinds):
                self._define_class(base_name, base, self._kept_bases(base), self._members[base])
        constants = [text for text in members.values() if "def " not in text]
        methods = [text.rstrip() for text in members.values() if "def " in text]
        doc = _docstring(vars(cls).get("__doc__") or "", cls.__name__)
        if doc and cls is self.told[0]:
            doc = f'"""The rule of `{self.told[1]}`, documented there."""'
        head = f"class {name}({', '.join(base_names)}):" if base_names else f"class {name}:"
        parts = [part for part in (doc, "\n".join(constants), *methods) if part]
        body = textwrap.indent("\n\n".join(parts or ["pass"]), "    ")
        support = is_platform(cls.__module__)
        self.names.define(Definition(name, f"{head}\n{body}", "class", set(base_names), support))

    def _construct(self, rule: Declared, *, top: bool) -> str:
        kind = self.kind_of(rule)
        declared = rule.declared()
        arguments = []
        for name in kind.ordered_fields:
            value = getattr(rule, name)
            if top and isinstance(declared.get(name), Hyper):
                arguments.append(f'{name}=self.defaults["{name}"]')
            else:
                arguments.append(f"{name}={self._value(value, f'{type(rule).__name__}.{name}', top)}")
        return f"{kind.name}({', '.join(arguments)})"

    def instance(self, rule: Declared) -> str:
        """An expression for a rule that is a constant of a module."""
        return self._construct(rule, top=False)

    def _value(self, value: Any, what: str, top: bool = False) -> str:
        if isinstance(value, Declared):
            return self._construct(value, top=top)
        is_theta = isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values())
        if isinstance(value, Tensor) or is_theta:
            return self._tensors(value, what.rpartition(".")[2])
        if isinstance(value, (tuple, list)):
            entries = [self._value(entry, what, top) for entry in value]
            tail = "," if isinstance(value, tuple) and len(entries) == 1 else ""
            left, right = "()" if isinstance(value, tuple) else "[]"
            return f"{left}{', '.join(entries)}{tail}{right}"
        return self.names.literal(value, what)

    def _tensors(self, value: Tensor | dict[str, Tensor], wanted: str) -> str:
        self.needs.add("device")
        label, count = wanted, 2
        while any(name.startswith(f"{label}/") for name in self.tensors):
            label, count = f"{wanted}_{count}", count + 1
        named = value if isinstance(value, dict) else {"value": value}
        self.tensors |= {f"{label}/{name}": tensor.detach().cpu() for name, tensor in named.items()}
        return f'load_tensors("{label}", device)' + ("" if isinstance(value, dict) else '["value"]')


def _all_parts(rule: Declared) -> list[Declared]:
    return [rule, *(inner for part in rule.parts().values() for inner in _all_parts(part))]


def _makes_part(rule: Declared, member: Any, attribute: str) -> bool:
    """Whether a property gives a rule, which is then written as a finished object: a file cannot hold what makes rules."""
    if not isinstance(member, (property, cached_property)):
        return False
    try:
        return isinstance(getattr(rule, attribute), Declared)
    except TypeError:  # a rule without this part says so when it is asked for it, in the file as well
        return False


def _options(rule: Declared) -> dict[str, Any]:
    return {name: value for name, value in rule.values().items() if name not in rule.hp}


def _entries(slots: Iterable[str]) -> list[str]:
    return [f'slots["{slot}"]' for slot in slots]


def _function(member: Any) -> Callable[..., Any] | None:
    """The Python function within a member of a class, if it is code."""
    if isinstance(member, (classmethod, staticmethod)):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    unwrapped = inspect.unwrap(member) if callable(member) and not isinstance(member, type) else member
    return unwrapped if isinstance(unwrapped, FunctionType) else None


def _function_text(name: str, arguments: str, doc: str, body: list[str]) -> str:
    lines = [f'"""{doc}"""', *body] if doc else body
    return "\n".join([f"def {name}({arguments}):", *(f"    {line}" for line in lines)])


def _docstring(doc: str, name: str) -> str:
    """The class's own docstring as source (not the one that `dataclass` invents)."""
    if not doc or doc.startswith(f"{name}("):
        return ""
    return quoted(inspect.cleandoc(doc))
