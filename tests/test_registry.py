"""The registry: one bad plugin never takes the platform down, and every refusal says what to do."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import metaopt
from metaopt import registry
from metaopt.hookspecs import Spec, hookimpl
from metaopt.registry import KINDS, Registry, RegistryError, UnknownName


def plugin(*specs, hook="metaopt_optimizers", error=None):
    """A plugin module with one hook, as a stranger would write it."""

    @hookimpl
    def offer():
        if error:
            raise error
        return list(specs)

    module = ModuleType("stranger")
    setattr(module, hook, offer)
    return module


def counter(name, factory="collections:Counter", **fields):
    return Spec(name, factory, **fields)


def test_every_hook_has_a_kind():
    from metaopt import hookspecs

    hooks = {name for name in vars(hookspecs) if name.startswith("metaopt_")}
    assert set(KINDS.values()) == hooks


def test_listing_everything_imports_no_torch():
    code = (
        "import sys, metaopt\n"
        "from metaopt import registry\n"
        "assert all(report.error is None for report in registry.plugins()), registry.plugins()\n"
        "for kind in registry.KINDS: registry.specs(kind)\n"
        "assert 'adamw' in registry.specs('optimizer')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_clashing_name_names_both_plugins_and_spares_all_others():
    found = Registry(
        {"ours": plugin(counter("twin"), counter("left")), "theirs": plugin(counter("twin"), counter("right"))}
    )
    with pytest.raises(RegistryError, match="'twin' is offered by plugins 'ours' and 'theirs'"):
        found.get("optimizer", "twin")
    with pytest.raises(RegistryError, match="'ours' and 'theirs'"):
        found.create("optimizer", "twin")
    assert list(found.specs("optimizer")) == ["left", "right"]
    assert found.create("optimizer", "left", a=1) == {"a": 1}
    assert len(found.clashes()) == 1


def test_one_name_may_serve_two_kinds():
    found = Registry({"a": plugin(counter("es")), "b": plugin(counter("es"), hook="metaopt_estimators")})
    assert found.owner("optimizer", "es") == "a"
    assert found.owner("estimator", "es") == "b"


def test_same_name_twice_in_one_plugin_is_a_clash_too():
    found = Registry({"ours": plugin(counter("twin"), counter("twin"))})
    with pytest.raises(RegistryError, match="'twin' is offered by plugins 'ours' and 'ours'"):
        found.get("optimizer", "twin")


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (plugin(error=RuntimeError("no licence\nsecond line")), "metaopt_optimizers failed: RuntimeError: no licence"),
        (
            plugin("adam"),
            "metaopt_optimizers failed: TypeError: a hook returns a list of metaopt.Spec, got 'adam' in it",
        ),
        (plugin(counter("x", factory="no_colon")), "must be 'package.module:attribute'"),
        (plugin(counter("a:b")), "must not be empty nor hold a colon"),
        (plugin(hook="metaopt_optimisers"), "is no hook of metaopt; did you mean 'metaopt_optimizers'"),
        (ModuleType("empty"), "it implements no hook; decorate its functions with metaopt.hookimpl"),
    ],
)
def test_broken_plugin_is_reported_in_one_line_and_stops_nothing(broken, sentence):
    found = Registry({"broken": broken, "sound": plugin(counter("works"))})
    broken_report, sound_report = found.plugins()
    assert sentence in broken_report.error
    assert "\n" not in broken_report.error
    assert sound_report.error is None and sound_report.counts == {"optimizer": 1}
    assert found.create("optimizer", "works") == {}


def test_hook_that_raises_does_not_silence_the_plugins_other_hooks():
    half = plugin(counter("works"), hook="metaopt_tasks")
    half.metaopt_optimizers = plugin(error=RuntimeError("boom")).metaopt_optimizers
    found = Registry({"half": half})
    assert list(found.specs("task")) == ["works"]
    assert "boom" in found.plugins()[0].error


def entry_point(name, value, distribution):
    dist = SimpleNamespace(name=distribution, version="1.2", locate_file=lambda path: Path("/site"))
    point = metadata.EntryPoint(name, value, "metaopt")
    vars(point).update(dist=dist)
    return point


def test_entry_points_that_cannot_be_imported_are_reported_with_their_package(monkeypatch, tmp_path):
    (tmp_path / "plugin_that_exits.py").write_text("raise SystemExit('not on this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        entry_point("gone", "no_such_module_at_all", "pkg-gone"),
        entry_point("exits", "plugin_that_exits", "pkg-exits"),
        entry_point("engine", "metaopt.builtin", "torch-metaopt"),
        entry_point("engine", "metaopt_classic.plugin", "pkg-same-name"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    gone, exits, engine, namesake = Registry.discover().plugins()
    assert (gone.distribution, gone.version, gone.where) == ("pkg-gone", "1.2", str(Path("/site")))
    assert gone.error == "could not be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"
    assert "not on this machine" in exits.error
    assert engine.error is None and engine.where.endswith("builtin.py")
    assert namesake.name == "engine (pkg-same-name)" and namesake.counts["optimizer"] >= 9


def test_unknown_names_suggest_the_nearest():
    found = Registry({"p": plugin(counter("adamw"), counter("lion"))})
    with pytest.raises(UnknownName, match=r"no optimizer is called 'adamm'; did you mean 'adamw'\?"):
        found.create("optimizer", "adamm")
    with pytest.raises(UnknownName, match="there are adamw, lion"):
        found.get("optimizer", "zzz")
    with pytest.raises(UnknownName, match="no data source is called 'x'; there is none"):
        found.get("data_source", "x")
    many = Registry({"p": plugin(*(counter(f"task{k}") for k in range(40)), hook="metaopt_tasks")})
    with pytest.raises(UnknownName, match=r"no task is called 'zzz'; there are 40 \(metaopt list tasks\)$"):
        many.get("task", "zzz")
    with pytest.raises(RegistryError, match="there is no kind 'optimiser'; did you mean 'optimizer'"):
        found.specs("optimiser")


def test_names_of_another_kind_are_told():
    learned = plugin(counter("velo"), hook="metaopt_learned_optimizers")
    found = Registry({"p": plugin(counter("lion")), "q": learned})
    with pytest.raises(UnknownName, match=r"no optimizer is called 'velo'; one learned optimizer is$"):
        found.get("optimizer", "velo")
    with pytest.raises(
        UnknownName, match=r"no optimizer is called 'vello'; did you mean the learned optimizer 'velo'\?"
    ):
        found.get("optimizer", "vello")


def test_unknown_name_mentions_that_a_plugin_failed():
    found = Registry({"broken": plugin(error=RuntimeError("boom"))})
    with pytest.raises(UnknownName, match="see metaopt plugins"):
        found.get("optimizer", "adam")


def test_arguments_override_defaults():
    found = Registry({"p": plugin(counter("c", defaults={"a": 1, "b": 2}))})
    assert found.create("optimizer", "c", b=3) == {"a": 1, "b": 3}
    assert found.load("optimizer", "c")(a=0) == {"a": 0, "b": 2}


def test_arguments_called_kind_and_name_reach_the_factory():
    found = Registry({"p": plugin(counter("c"))})
    assert found.create("optimizer", "c", name="n", kind="k") == {"name": "n", "kind": "k"}


def test_argument_that_the_factory_does_not_take_is_refused_with_those_it_takes():
    found = Registry({"p": plugin(counter("f", factory="fractions:Fraction"))})
    with pytest.raises(TypeError, match="optimizer 'f' takes no argument 'lr'; it takes numerator, denominator"):
        found.create("optimizer", "f", lr=1)


def test_missing_extra_says_what_to_install():
    found = Registry({"p": plugin(counter("tpe", factory="no_such_package.samplers:TPE", extra="tune"))})
    with pytest.raises(
        RegistryError, match=r"optimizer 'tpe' needs the extra 'tune': pip install 'torch-metaopt\[tune\]'"
    ):
        found.create("optimizer", "tpe")


@pytest.mark.parametrize("factory", ["no_such_package:X", "collections:NoSuchThing"])
def test_factory_that_cannot_be_imported_names_its_plugin(factory):
    found = Registry({"theirs": plugin(counter("x", factory=factory))})
    with pytest.raises(RegistryError, match="optimizer 'x' of plugin 'theirs' could not be loaded"):
        found.create("optimizer", "x")


USER_FILE = """
from dataclasses import dataclass

@dataclass
class Mine:
    rate: float = 0.5

made = Mine(2.0)
"""


def test_reference_to_a_file_gives_a_class_that_dataclasses_and_inspect_understand(tmp_path):
    path = tmp_path / "my rules.py"
    path.write_text(USER_FILE)
    mine = registry.create("optimizer", f"{path}:Mine", rate=0.25)
    assert mine.rate == 0.25
    assert "rate: float = 0.5" in inspect.getsource(type(mine))
    assert type(registry.create("optimizer", f"{path}:Mine")) is type(mine)
    assert registry.create("optimizer", f"{path}:made").rate == 2.0
    with pytest.raises(RegistryError, match="is no class or function, so it takes no argument 'rate'"):
        registry.create("optimizer", f"{path}:made", rate=1)


def test_edited_file_is_loaded_anew(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text("value = 1")
    assert registry.load("optimizer", f"{path}:value") == 1
    path.write_text("value = 'edited'")
    assert registry.load("optimizer", f"{path}:value") == "edited"


def test_reference_to_a_module():
    assert registry.create("task", "collections:Counter", a=1) == {"a": 1}


def test_bad_references_are_one_sentence_each(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(USER_FILE)
    (tmp_path / "broken.py").write_text("import no_such_package")
    for reference, sentence in {
        f"{tmp_path}/absent.py:Mine": "there is no file",
        f"{path}:Mime": "has no 'Mime'; did you mean 'Mine'?",
        f"{path}:": "is no reference; write file.py:Attribute",
        f"{tmp_path}/broken.py:X": "broken.py could not be imported: ModuleNotFoundError",
        "no_such_package.rules:X": "no_such_package.rules could not be imported",
    }.items():
        with pytest.raises(RegistryError) as caught:
            registry.create("optimizer", reference)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not [name for name in sys.modules if name.startswith("metaopt_file_broken")]


def test_plugin_registered_in_a_notebook_may_be_registered_again():
    found = Registry()
    found.register(plugin(counter("draft", defaults={"v": 1})), "notebook")
    report = found.register(plugin(counter("draft", defaults={"v": 2})), "notebook")
    assert report.counts == {"optimizer": 1} and report.where == "this process"
    assert found.create("optimizer", "draft") == {"v": 2}
    assert len(found.plugins()) == 1


def test_objects_with_hook_methods_are_plugins():
    class Draft:
        @hookimpl
        def metaopt_optimizers(self):
            return [counter("draft")]

    found = Registry()
    found.register(Draft(), "notebook")
    assert found.create("optimizer", "draft") == {}


def test_registering_follows_the_clash_rules():
    found = Registry({"installed": plugin(counter("adam"), counter("lion"))})
    found.register(plugin(counter("adam")), "notebook")
    with pytest.raises(RegistryError, match="'installed' and 'notebook'"):
        found.get("optimizer", "adam")
    assert list(found.specs("optimizer")) == ["lion"]


def test_registering_refuses_broken_plugins_and_installed_names():
    with pytest.raises(RegistryError, match=r"plugin 'notebook' was not added: .* boom"):
        registry.register(plugin(error=RuntimeError("boom")), "notebook")
    with pytest.raises(RegistryError, match="plugin 'classic' is already there from torch-metaopt"):
        registry.register(plugin(counter("x")), "classic")
    assert "notebook" not in [report.name for report in registry.plugins()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_first_party_factory_can_be_imported(kind):
    for name in registry.specs(kind):
        assert callable(registry.load(kind, name)), name


def test_every_registered_optimizer_is_a_rule():
    for name in registry.specs("optimizer"):
        assert isinstance(registry.create("optimizer", name), metaopt.UpdateRule), name


def test_every_registered_objective_is_one_of_the_kind_that_its_first_tag_says():
    from metaopt.objective import Objective

    for name, spec in registry.specs("objective").items():
        made = registry.create("objective", name)
        assert isinstance(made, Objective) and made.kind == spec.tags[0], name


def test_no_public_name_is_a_submodule_that_would_replace_it():
    for name in metaopt.__all__:
        assert importlib.util.find_spec(f"metaopt.{name}") is None, name


def test_lazy_names_are_those_that_type_checkers_see():
    source = ast.parse(inspect.getsource(metaopt))
    block = next(node for node in source.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(metaopt.__all__)


@pytest.mark.parametrize("name", metaopt.__all__)
def test_public_name_resolves(name):
    assert getattr(metaopt, name) is not None
    assert name in dir(metaopt)


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'metaopt' has no attribute 'optimiser'"):
        _ = metaopt.optimiser
