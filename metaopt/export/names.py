"""What the names in copied code stand for: each is imported, copied, written as a literal, or refused."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Protocol, get_origin

import torch

from metaopt.export.rewrite import Edit, ExportError, Use, apply, imports_within, plain, source_of, uses
from metaopt.program import where
from metaopt.rule import Declared

_WHERE = '''def where(condition, x, y):
    """``x if condition else y``, for floats and tensors."""
    if isinstance(condition, torch.Tensor):
        x, y = (torch.as_tensor(value, dtype=getattr(value, "dtype", torch.float64)) for value in (x, y))
        return torch.where(condition, x, y)
    return x if condition else y'''
_CATEGORIES = ("constant", "function", "class", "instance")
_MISSING = object()


@dataclass
class Definition:
    """One definition at the top level of the file; ``eager`` names must be defined before it."""

    name: str
    text: str
    category: str
    eager: set[str] = field(default_factory=set)
    support: bool = False  # metaopt's own contracts: told last


class _Rules(Protocol):
    """What `Names` asks of the bundle: rules that are constants of modules."""

    def kind_of(self, rule: Declared) -> Any: ...
    def reach(self, kind: Any, attribute: str) -> None: ...
    def instance(self, rule: Declared) -> str: ...


class Names:
    """The top level of the file: imports and definitions, under names that do not clash.

    Args:
        rules: the bundle that rule objects belong to; None where the code names none.
        reserved: names that are taken.
        roots: packages, beside metaopt's, whose code may be copied.
    """

    def __init__(self, rules: _Rules | None, reserved: Iterable[str], roots: Iterable[str]) -> None:
        self.imports: set[str] = set()
        self._rules = rules
        self._roots = {"metaopt", "__main__", *roots}
        self._taken = {"torch", "math", *reserved}
        self._definitions: dict[str, Definition] = {}
        self._named: dict[Any, str] = {}
        self._alive: list[Any] = []  # ids are keys only while their objects live
        self._instances: list[tuple[str, Declared]] = []

    # --- definitions ----------------------------------------------------------------------------------------------

    def claim(self, wanted: str, otherwise: str = "") -> str:
        """A free name: ``wanted``, or else ``otherwise``, or else with a number."""
        name, count = wanted, 2
        while name in self._taken or hasattr(builtins, name):
            if otherwise and name == wanted:
                name = otherwise
            else:
                name, count = f"{wanted}_{count}", count + 1
        self._taken.add(name)
        return name

    def copy(self, things: Iterable[Any]) -> None:
        """Make functions and classes part of the file, under their own names."""
        things = list(things)
        for thing in things:
            self._named[id(thing)] = thing.__name__
            self._taken.add(thing.__name__)
        for thing in things:
            self._copy(thing, thing.__name__)

    def define_instances(self) -> None:
        """Define the rules that are constants of modules, when all that they reach is known."""
        for name, rule in self._instances:
            assert self._rules is not None
            text = f"{name} = {self._rules.instance(rule)}"
            self.define(Definition(name, text, "instance", set(re.findall(r"\w+", text)) - {name}))

    def define(self, definition: Definition) -> None:
        """Add a definition, once."""
        self._definitions.setdefault(definition.name, definition)

    def is_defined(self, name: str) -> bool:
        """Whether there is a definition of that name."""
        return name in self._definitions

    def class_name(self, cls: type, known: Iterable[str]) -> str:
        """The name of a base class: that of its kind, if it has one."""
        if id(cls) not in self._named:
            self._named[id(cls)] = next(iter(known), None) or self.claim(cls.__name__)
        return self._named[id(cls)]

    def ordered(self) -> list[str]:
        """Texts, the rule's own first: constants, functions, classes, instances; each after what it is made from."""
        done: dict[str, str] = {}

        def place(definition: Definition) -> None:
            if definition.name in done:
                return
            done[definition.name] = ""  # a cycle ends here
            for name in sorted(definition.eager & self._definitions.keys()):
                place(self._definitions[name])
            del done[definition.name]
            done[definition.name] = definition.text

        for definition in sorted(self._definitions.values(), key=lambda d: (d.support, _CATEGORIES.index(d.category))):
            place(definition)
        return _with_constants_together([(self._definitions[name].category, text) for name, text in done.items()])

    # --- code -----------------------------------------------------------------------------------------------------

    def function_text(self, function: Callable[..., Any], what: str) -> str:
        """The text of a function, with all that it names made part of the file."""
        return self._code(source_of(function, what), _scope(function), what)[0]

    def _code(self, source: str, scope: Callable[[str], Any], what: str) -> tuple[str, set[str]]:
        """``source`` in the names of the file, and the names that it needs when executed."""
        text, local = imports_within(plain(source))
        local_values = {name: getattr(importlib.import_module(m), attr) for name, (m, attr) in local.items()}
        edits: list[Edit] = []
        eager: set[str] = set()
        for use in uses(text):
            value = local_values.get(use.name, _MISSING)
            value = scope(use.name) if value is _MISSING else value
            if value is _MISSING:
                if hasattr(builtins, use.name):
                    continue
                raise ExportError(f"{what} uses {use.name}, which is not defined where it is written")
            name, edit = self._resolve(use, value, scope, what)
            edits += edit
            eager |= {name} if use.eager else set()
        return apply(text, edits), eager

    def _resolve(self, use: Use, value: Any, scope: Callable[[str], Any], what: str) -> tuple[str, list[Edit]]:
        depth, wanted, home = 0, use.name, scope("__name__")
        while isinstance(value, ModuleType) and not self._is_library(value.__name__):
            self._require_own(value.__name__, ".".join([use.name, *use.attributes]), what)
            if depth == len(use.attributes):
                raise ExportError(f"{what} passes the module {value.__name__} around; name what it needs of it")
            home, wanted = value.__name__, use.attributes[depth]
            value = getattr(value, wanted)
            depth += 1
        name = self.name_of(value, wanted, home, what)
        if self._rules is not None and isinstance(value, Declared) and depth < len(use.attributes):
            self._rules.reach(self._rules.kind_of(value), use.attributes[depth])
        written = ".".join([use.name, *use.attributes[:depth]])
        return name, [(use.start, use.ends[depth], name)] if name != written else []

    def name_of(self, value: Any, wanted: str, home: str, what: str) -> str:
        """The name of a value in the file; the value becomes part of the file."""
        by_identity = isinstance(value, (ModuleType, type, FunctionType, BuiltinFunctionType, Declared))
        key = id(value) if by_identity else (home, wanted)
        if key not in self._named:
            self._alive.append(value)
            self._named[key] = self._new_name(value, wanted, home, what)
        return self._named[key]

    def _new_name(self, value: Any, wanted: str, home: str, what: str) -> str:
        if isinstance(value, ModuleType):
            return self._import(*value.__name__.rpartition(".")[::2], wanted)
        if self._rules is not None and isinstance(value, Declared):
            name = self.claim(wanted)
            self._rules.kind_of(value)
            self._instances.append((name, value))
            return name
        if isinstance(value, type) and issubclass(value, Declared):
            raise ExportError(f"{what} uses the class {value.__name__} itself; a file holds rules as finished objects")
        if value is where:
            name = self.claim("where")
            self.define(Definition(name, _WHERE.replace("where", name, 1), "function"))
            return name
        if callable(value) and hasattr(value, "__name__"):
            library = self._library_home(value)
            if library:
                return self._import(library, value.__name__, wanted)
            if isinstance(inspect.unwrap(value), (FunctionType, type)):
                self._require_own(value.__module__, value.__qualname__, what)
                return self._copy(value, self.claim(value.__name__ if value.__name__ != "<lambda>" else wanted))
        self._require_own(type(value).__module__, wanted, what, also_library=True)
        return self._constant(value, wanted, home, what)

    def _copy(self, value: Any, name: str) -> str:
        """A function or a plain class, whole."""
        self._taken.add(name)
        self._named[id(value)] = name
        self._alive.append(value)
        inner = inspect.unwrap(value)
        if isinstance(inner, FunctionType) and inner.__name__ == "<lambda>":
            raise ExportError(f"{name} is a lambda; define it with def, so that its source can be copied")
        what = f"{inner.__module__}.{inner.__qualname__}"
        scope = _scope(inner) if isinstance(inner, FunctionType) else _class_scope(inner)
        text, eager = self._code(source_of(inner, what), scope, what)
        if name != inner.__name__:
            text = re.sub(rf"(?m)^(class|def) {inner.__name__}\b", rf"\1 {name}", text, count=1)
        category = "class" if isinstance(inner, type) else "function"
        self.define(Definition(name, text.rstrip(), category, eager - {name}, is_platform(inner.__module__)))
        return name

    def _constant(self, value: Any, wanted: str, home: str, what: str) -> str:
        name = self.claim(wanted)
        found = _assignment(sys.modules.get(home), wanted, self._is_library)
        if found is None or _contradicts(found[0], value):
            self.define(Definition(name, f"{name} = {self.literal(value, f'{wanted} (used by {what})')}", "constant"))
        else:
            source, module = found
            text, eager = self._code(source, lambda n: vars(module).get(n, _MISSING), f"{module.__name__}.{wanted}")
            support = is_platform(module.__name__)
            self.define(Definition(name, f"{name} = {text.strip()}", "constant", eager, support))
        return name

    def literal(self, value: Any, what: str) -> str:
        """A value as source: numbers, strings, None, dtypes, functions, and tuples, lists, sets and dicts of them."""
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, str) and repr(value)[0] == "'" and '"' not in value:
            return f'"{repr(value)[1:-1]}"'
        if value is None or value is ... or isinstance(value, (bool, int, float, str, bytes, complex)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.device)):
            return repr(value) if isinstance(value, torch.dtype) else f"torch.{value!r}"
        if type(value) in (tuple, list, set, frozenset, dict):
            text = repr(value)
            try:
                ast.literal_eval(text)
            except (ValueError, SyntaxError):
                raise ExportError(f"{what} holds {text[:80]}, which cannot be written as source") from None
            return text
        if callable(value) and get_origin(value) is None and getattr(value, "__name__", "").isidentifier():
            return self.name_of(value, value.__name__, value.__module__ or "", what)
        kind = type(value).__name__
        raise ExportError(f"{what} is a {kind}, which cannot be written as source; make it in a method or a property")

    # --- imports --------------------------------------------------------------------------------------------------

    def _import(self, parent: str, leaf: str, wanted: str) -> str:
        # a module under its own name is what that name is reserved for
        name = wanted if wanted == leaf and not parent else self.claim(wanted)
        alias = f" as {name}" if name != leaf else ""
        self.imports.add(f"from {parent} import {leaf}{alias}" if parent else f"import {leaf}{alias}")
        return name

    def _library_home(self, value: Any) -> str | None:
        candidates = [value.__module__, "torch", "torch.nn.functional", "torch.linalg", "torch.special"]
        for home in candidates:
            module = sys.modules.get(home or "")
            if home and self._is_library(home) and getattr(module, value.__name__, None) is value:
                return str(home)
        return None

    def _is_library(self, module: str) -> bool:
        root = module.split(".")[0]
        return root == "torch" or (root in sys.stdlib_module_names and root != "__main__")

    def _require_own(self, module: str, name: str, what: str, also_library: bool = False) -> None:
        root = module.split(".")[0]
        if root in self._roots or root.startswith("metaopt_") or (also_library and self._is_library(module)):
            return
        raise ExportError(
            f"{what} uses {name} of {root}, but an exported file may import torch and the standard library only"
        )


def is_platform(module: str) -> bool:
    """Whether a module is the engine's: what rules rest on, told after them."""
    return module.split(".")[0] == "metaopt"


def _scope(function: Callable[..., Any]) -> Callable[[str], Any]:
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def lookup(name: str) -> Any:
        if name in closed:
            return closed[name].cell_contents
        return function.__globals__.get(name, _MISSING)

    return lookup


def _class_scope(cls: type) -> Callable[[str], Any]:
    module = vars(sys.modules[cls.__module__])
    # what NamedTuple and dataclass generate has a module of its own
    written = [m for m in vars(cls).values() if isinstance(m, FunctionType) and m.__module__ == cls.__module__]
    scopes = [_scope(member) for member in written]

    def lookup(name: str) -> Any:
        return next((value for scope in scopes if (value := scope(name)) is not _MISSING), module.get(name, _MISSING))

    return lookup


def _assignment(
    module: ModuleType | None, name: str, is_library: Callable[[str], bool]
) -> tuple[str, ModuleType] | None:
    """The right side of ``name = ...`` at the top of a module, or of the module it is imported from."""
    if module is None or is_library(module.__name__):
        return None
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return None
    found = None
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            package = "." * node.level + (node.module or "")
            imported = importlib.import_module(package, module.__package__) if node.level else sys.modules.get(package)
            found = _assignment(imported, original, is_library)
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        is_assigned = isinstance(node, (ast.Assign, ast.AnnAssign))
        if is_assigned and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            segment = ast.get_source_segment(source, value) if value is not None else None
            parenthesis = segment and "\n" in segment and segment[0] not in "([{"
            found = (f"({segment})" if parenthesis else segment, module) if segment else found
    return found


def _contradicts(source: str, value: Any) -> bool:
    """Whether a constant was changed after it was assigned."""
    try:
        return bool(ast.literal_eval(source) != value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _with_constants_together(texts: list[tuple[str, str]]) -> list[str]:
    """One block of the constants, instead of one paragraph each."""
    together: list[tuple[str, str]] = []
    for category, text in texts:
        single = category in ("constant", "instance")
        if together and single and together[-1][0] == category:
            together[-1] = (category, f"{together[-1][1]}\n{text}")
        else:
            together.append((category, text))
    return [text for _, text in together]
