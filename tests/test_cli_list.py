"""``metaopt list`` and ``metaopt plugins``: quick, greppable, and one line for each mistake."""

import json
import subprocess
import sys

import pytest

from metaopt import registry
from metaopt.cli import main
from metaopt.cli.commands.catalogue import KIND_WORDS
from metaopt.hookspecs import Spec, hookimpl


def run(capsys, *arguments):
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_listing_imports_no_torch():
    code = (
        "import sys\n"
        "from metaopt.cli import main\n"
        "assert main(['list', 'optimizers']) == 0\n"
        "assert main(['plugins']) == 0\n"
        "assert main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "metaopt", "list", "exporter"], capture_output=True, text=True, check=True
    )
    assert "torch" in done.stdout


def test_every_kind_can_be_listed_in_plural_and_singular(capsys):
    assert set(KIND_WORDS.values()) == set(registry.KINDS)
    for word, kind in KIND_WORDS.items():
        for spelling in (word, word.removesuffix("s"), kind):
            code, out, _ = run(capsys, "list", spelling)
            assert code == 0 and out.startswith("name")


def test_table_has_one_line_for_each_name(capsys):
    _, out, err = run(capsys, "list", "optimizers")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(registry.specs("optimizer"))
    assert "Kingma and Ba, 2015" in out and err == ""


def test_json_holds_all_that_a_spec_says(capsys):
    _, out, _ = run(capsys, "list", "optimizers", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["nesterov"]["defaults"] == {"momentum": 0.9, "nesterov": True}
    assert rows["adamw"]["factory"] == "metaopt_classic.adam:AdamW"
    assert rows["adamw"]["kind"] == "optimizer" and rows["adamw"]["plugin"] == "classic"


def test_plugins_tells_where_each_came_from(capsys):
    code, out, _ = run(capsys, "plugins", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["classic"]["distribution"] == "torch-metaopt" and rows["classic"]["where"].endswith("plugin.py")
    _, out, _ = run(capsys, "plugins")
    assert "torch-metaopt" in out and "3 truncations" in out


def test_broken_plugins_and_clashes_are_told_on_stderr(capsys, monkeypatch):
    class Ours:
        @hookimpl
        def metaopt_optimizers(self):
            return [Spec("twin", "a:b"), Spec("sound", "a:b", "a [bold]summary[/bold]")]

    class Theirs:
        @hookimpl
        def metaopt_optimizers(self):
            return [Spec("twin", "a:b")]

        @hookimpl
        def metaopt_tasks(self):
            raise RuntimeError("boom")

    monkeypatch.setattr(registry, "default", lambda: registry.Registry({"ours": Ours(), "theirs": Theirs()}))
    code, out, err = run(capsys, "list", "optimizers")
    assert code == 0
    assert "sound" in out and "[bold]summary[/bold]" in out and "twin" not in out
    assert err.splitlines() == [
        "metaopt: plugin 'theirs': metaopt_tasks failed: RuntimeError: boom",
        "metaopt: optimizer 'twin' is offered by plugins 'ours' and 'theirs'; one of them must rename it",
    ]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["list", "optimisers"], "did you mean 'optimizers'?"),
        (["list", "zebras"], "there are optimizers, learned-optimizers, tasks"),
        (["list"], "KIND"),
        (["list", "tasks", "--yaml"], "--yaml"),
        (["lst"], "lst"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, arguments, part):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("metaopt: ") and err.count("\n") == 1
    assert part in err


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("METAOPT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="zebras"):
        main(["list", "zebras"])


@pytest.mark.parametrize("command", [[], ["list"], ["plugins"]])
def test_help_shows_an_example(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert not command or f"metaopt {command[0]}" in out.split("Example:")[1]
