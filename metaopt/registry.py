"""From names to things: which plugins there are, what they offer, and how to make it.

A plugin that fails is reported and takes nothing else down; a name that two plugins offer is an error for that name
only. Nothing here imports torch until `create` or `load` imports a factory.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pluggy

from metaopt import hookspecs
from metaopt.hookspecs import Spec

KINDS: Mapping[str, str] = {
    "optimizer": "metaopt_optimizers",
    "learned_optimizer": "metaopt_learned_optimizers",
    "task": "metaopt_tasks",
    "problem": "metaopt_problems",
    "data_source": "metaopt_data_sources",
    "objective": "metaopt_objectives",
    "estimator": "metaopt_estimators",
    "hypergradient": "metaopt_hypergradients",
    "truncation": "metaopt_truncations",
    "curriculum": "metaopt_curricula",
    "unroll_backend": "metaopt_unroll_backends",
    "kernel": "metaopt_kernels",
    "proposer": "metaopt_proposers",
    "importer": "metaopt_importers",
    "exporter": "metaopt_exporters",
    "zoo_rule": "metaopt_zoo_rules",
    "command": "metaopt_commands",
}
"""Kind -> the hook by which plugins offer things of that kind."""

ZOO = "zoo:"
"""How references to entries of a zoo begin."""

_KIND_OF = {hook: kind for kind, hook in KINDS.items()}
_GROUP = "metaopt"
_MOST_SHOWN = 30
"""Names in one message."""


class RegistryError(ValueError):
    """A name, a reference or a plugin cannot be used; the message says why in one sentence."""


class UnknownName(RegistryError):
    """Nothing of that kind has that name."""


@dataclass(frozen=True)
class PluginReport:
    """What became of one plugin.

    Attributes:
        name: its entry point's name, which clash messages use.
        module: the module that implements the hooks.
        distribution, version: the installed package it came with; empty for plugins added by `register`.
        where: its file; the directory of its distribution if it could not be imported.
        counts: how many things of each kind it offers.
        error: what went wrong, in one sentence; what did not go wrong still works.
    """

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    where: str = "this process"
    counts: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None


class _Offer(NamedTuple):
    plugin: str
    kind: str
    spec: Spec


class Registry:
    """The plugins of one process. Programs use the module's functions; tests build their own.

    Args:
        plugins: name -> module or object that implements hooks with ``metaopt.hookimpl``.
    """

    def __init__(self, plugins: Mapping[str, object] | None = None) -> None:
        self._manager = pluggy.PluginManager(_GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._reports: dict[str, PluginReport] = {}
        self._offers: list[_Offer] = []
        self._named: dict[str, dict[str, list[_Offer]]] = {}
        for name, plugin in (plugins or {}).items():
            self._add(plugin, _report_of(plugin, name))

    @classmethod
    def discover(cls) -> Registry:
        """A registry of every installed entry point of the group ``metaopt``."""
        registry = cls()
        for point in metadata.entry_points(group=_GROUP):
            registry._add_entry_point(point)
        return registry

    def specs(self, kind: str) -> dict[str, Spec]:
        """Everything usable of one kind, by name, sorted."""
        return {name: offers[0].spec for name, offers in self._by_name(kind).items() if len(offers) == 1}

    def get(self, kind: str, name: str) -> Spec:
        """The spec of one name.

        Raises:
            RegistryError: unknown (`UnknownName`), or offered by two plugins.
        """
        return self._offer(kind, name).spec

    def owner(self, kind: str, name: str) -> str:
        """The plugin that offers this name; raises as `get`."""
        return self._offer(kind, name).plugin

    def plugins(self) -> list[PluginReport]:
        """Every plugin that was found, working or not, in order of discovery."""
        return list(self._reports.values())

    def clashes(self) -> list[str]:
        """One sentence for each name that is unusable because it was offered twice."""
        named = [(kind, *item) for kind in KINDS for item in self._by_name(kind).items()]
        return [_clash(kind, name, offers) for kind, name, offers in named if len(offers) > 1]

    def load(self, kind: str, name: str) -> Any:
        """Import what ``name`` stands for without calling it; a spec's defaults are bound to its factory.

        Raises:
            RegistryError: unknown, clashing, or it cannot be imported.
        """
        _require_kind(kind)
        if name.startswith(ZOO):
            return self._load_entry(kind, name)
        if ":" in name:
            return load_reference(name)
        offer = self._offer(kind, name)
        try:
            factory = pkgutil.resolve_name(offer.spec.factory)
        except Exception as error:
            raise _load_error(offer, error) from error
        return functools.partial(factory, **offer.spec.defaults) if offer.spec.defaults else factory

    def _load_entry(self, kind: str, reference: str) -> Any:
        spec = self.get("zoo_rule", reference.removeprefix(ZOO))
        gives = spec.facts.get("gives", kind)  # one that is unusable says so when it is called
        if gives != kind:
            raise RegistryError(f"{reference} is an {_words(gives)}, no {_words(kind)}")
        return self.load("zoo_rule", spec.name)

    def create(self, kind: str, name: str, /, **arguments: Any) -> Any:
        """Make the thing: call its factory with the spec's defaults, overridden by ``arguments``.

        Args:
            kind: one of `KINDS`.
            name: a registered name, an entry of a zoo as ``zoo:NAME``, or a reference to your own code:
                ``path/to/file.py:Attribute`` or ``package.module:Attribute``, which is called if it is a class or a function.
            **arguments: for the factory.

        Raises:
            RegistryError: unknown, clashing, or it cannot be imported.
            TypeError: an argument that the factory does not take.
        """
        factory = self.load(kind, name)
        if not callable(factory):
            if arguments:
                raise RegistryError(f"{name} is no class or function, so it takes no argument {min(arguments)!r}")
            return factory
        _check_arguments(factory, arguments, f"{kind} {name!r}")
        try:
            return factory(**arguments)
        except ModuleNotFoundError as error:
            if ":" in name:
                raise
            raise _load_error(self._offer(kind, name), error) from error

    def register(self, plugin: object, name: str) -> PluginReport:
        """Add a module or object that implements hooks, for this process; again under the same name, replace it.

        Raises:
            RegistryError: the name is an installed plugin's, or the plugin's hooks do not work.
        """
        before = self._reports.get(name)
        if before is not None and before.distribution:
            raise RegistryError(f"plugin {name!r} is already there from {before.distribution}; choose another name")
        self._remove(name)
        report = self._add(plugin, _report_of(plugin, name))
        if report.error:
            self._remove(name)
            raise RegistryError(f"plugin {name!r} was not added: {report.error}")
        return report

    def _by_name(self, kind: str) -> dict[str, list[_Offer]]:
        _require_kind(kind)
        if kind not in self._named:
            found = self._named[kind] = {}
            for offer in sorted((o for o in self._offers if o.kind == kind), key=lambda offer: offer.spec.name):
                found.setdefault(offer.spec.name, []).append(offer)
        return self._named[kind]

    def _offer(self, kind: str, name: str) -> _Offer:
        known = self._by_name(kind)
        offers = known.get(name)
        if offers is None:
            broken = any(report.error for report in self.plugins())
            advice = " (a plugin failed to load: see metaopt plugins)" if broken else ""
            raise UnknownName(f"no {_words(kind)} is called {name!r}; {self._instead(kind, name, known)}{advice}")
        if len(offers) > 1:
            raise RegistryError(_clash(kind, name, offers))
        return offers[0]

    def _instead(self, kind: str, name: str, known: Iterable[str]) -> str:
        """What may have been meant: a name of this kind or of another, else what there is."""
        others = {offer.spec.name: offer.kind for offer in self._offers if offer.kind != kind}
        if name in others:
            return f"one {_words(others[name])} is"
        if not difflib.get_close_matches(name, known):
            for other in difflib.get_close_matches(name, others, 1, 0.8):
                return f"did you mean the {_words(others[other])} {other!r}?"
        return _nearest(name, known, f" (metaopt list {kind.replace('_', '-')}s)")

    def _add_entry_point(self, point: metadata.EntryPoint) -> None:
        assert point.dist is not None  # entry_points() reads them from distributions
        name = f"{point.name} ({point.dist.name})" if point.name in self._reports else point.name
        report = PluginReport(name, point.value, point.dist.name, point.dist.version, str(point.dist.locate_file("")))
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:
            self._reports[name] = replace(report, error=f"could not be imported: {_sentence(error)}")
        else:
            self._add(plugin, report)

    def _add(self, plugin: object, report: PluginReport) -> PluginReport:
        offers, problems = self._collect(plugin, report.name)
        counts = dict(Counter(offer.kind for offer in offers))
        where = getattr(plugin, "__file__", None) or report.where
        self._offers += offers
        self._named.clear()
        self._reports[report.name] = replace(report, where=where, counts=counts, error="; ".join(problems) or None)
        return self._reports[report.name]

    def _remove(self, name: str) -> None:
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        self._reports.pop(name, None)
        self._offers = [offer for offer in self._offers if offer.plugin != name]
        self._named.clear()

    def _collect(self, plugin: object, name: str) -> tuple[list[_Offer], list[str]]:
        """What each hook of one plugin returns, and what went wrong; a hook that raises silences no other."""
        try:
            self._manager.register(plugin, name)
        except Exception as error:
            return [], [f"could not be registered: {_sentence(error)}"]
        offers: list[_Offer] = []
        callers = self._manager.get_hookcallers(plugin)
        problems = [] if callers else ["it implements no hook; decorate its functions with metaopt.hookimpl"]
        for caller in callers or ():
            if caller.name not in _KIND_OF:
                problems.append(f"{caller.name} is no hook of metaopt; {_nearest(caller.name, _KIND_OF)}")
                continue
            for implementation in [found for found in caller.get_hookimpls() if found.plugin is plugin]:
                try:
                    offered: Any = implementation.function()
                    offers += [_Offer(name, _KIND_OF[caller.name], _checked(spec)) for spec in offered]
                except Exception as error:
                    problems.append(f"{caller.name} failed: {_sentence(error)}")
        return offers, problems


def load_reference(reference: str) -> Any:
    """The attribute that ``path/to/file.py:Attribute`` or ``package.module:Attribute`` names.

    A file is imported once, and again after it changed; it is in ``sys.modules``, so ``inspect.getsource`` works on it.

    Raises:
        RegistryError: no such file, module or attribute, or it cannot be imported.
    """
    target, _, attribute = reference.rpartition(":")
    if not target or not attribute:
        raise RegistryError(f"{reference!r} is no reference; write file.py:Attribute or package.module:Attribute")
    if target.endswith(".py"):
        module = _load_file(Path(target).expanduser())
    else:
        try:
            module = importlib.import_module(target)
        except Exception as error:
            raise RegistryError(f"{target} could not be imported: {_sentence(error)}") from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise RegistryError(f"{target} has no {attribute!r}; {_nearest(attribute, public)}") from error


_files: dict[Path, tuple[int, ModuleType]] = {}


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RegistryError(f"there is no file {path}; write path/to/file.py:Attribute")
    path = path.resolve()
    changed = path.stat().st_mtime_ns
    if path in _files and _files[path][0] == changed:
        return _files[path][1]
    # the checksum keeps files of one stem apart, and a user's torch.py from shadowing torch
    name = f"metaopt_file_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RegistryError(f"{path} could not be imported: {_sentence(error)}") from error
    _files[path] = (changed, module)
    return module


def _report_of(plugin: object, name: str) -> PluginReport:
    return PluginReport(name, getattr(plugin, "__name__", type(plugin).__name__))


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RegistryError(f"there is no kind {kind!r}; {_nearest(kind, KINDS)}")


def _checked(spec: object) -> Spec:
    if not isinstance(spec, Spec):
        raise TypeError(f"a hook returns a list of metaopt.Spec, got {spec!r} in it")
    if not spec.name or ":" in spec.name:
        raise ValueError(f"a name must not be empty nor hold a colon, got {spec.name!r}")
    if not all(spec.factory.partition(":")):
        raise ValueError(f"the factory of {spec.name!r} must be 'package.module:attribute', got {spec.factory!r}")
    return spec


def _check_arguments(factory: Callable[..., Any], arguments: Collection[str], what: str) -> None:
    if not arguments:
        return
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    taken = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in taken:
            raise TypeError(f"{what} takes no argument {name!r}; it takes {', '.join(taken) or 'none'}")


def _load_error(offer: _Offer, error: Exception) -> RegistryError:
    spec, what = offer.spec, f"{_words(offer.kind)} {offer.spec.name!r}"
    if spec.extra and isinstance(error, ModuleNotFoundError):
        return RegistryError(f"{what} needs the extra {spec.extra!r}: pip install 'torch-metaopt[{spec.extra}]'")
    return RegistryError(f"{what} of plugin {offer.plugin!r} could not be loaded: {_sentence(error)}")


def _clash(kind: str, name: str, offers: list[_Offer]) -> str:
    plugins = " and ".join(repr(offer.plugin) for offer in offers)
    return f"{_words(kind)} {name!r} is offered by plugins {plugins}; one of them must rename it"


def _nearest(name: str, known: Iterable[str], shown_by: str = "") -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    if len(names) > _MOST_SHOWN:
        return f"there are {len(names)}{shown_by}"
    return f"there are {', '.join(names)}" if names else "there is none"


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _words(kind: str) -> str:
    return kind.replace("_", " ")


@functools.cache
def default() -> Registry:
    """The registry of the installed plugins, built at first use."""
    return Registry.discover()


def specs(kind: str) -> dict[str, Spec]:
    """`Registry.specs` of the installed plugins."""
    return default().specs(kind)


def get(kind: str, name: str) -> Spec:
    """`Registry.get` among the installed plugins."""
    return default().get(kind, name)


def load(kind: str, name: str) -> Any:
    """`Registry.load` among the installed plugins."""
    return default().load(kind, name)


def create(kind: str, name: str, /, **arguments: Any) -> Any:
    """`Registry.create` among the installed plugins."""
    return default().create(kind, name, **arguments)


def plugins() -> list[PluginReport]:
    """`Registry.plugins` of this process."""
    return default().plugins()


def register(plugin: object, name: str) -> PluginReport:
    """`Registry.register` in this process: for notebooks."""
    return default().register(plugin, name)
