"""What may import what, imports inside functions included (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = sorted(path for path in (ROOT / "plugins").iterdir() if path.is_dir())

REGISTERED = {"metaopt_tasks", "metaopt_kernels", "metaopt_zoo"}
"""Plugins that lie elsewhere; what they offer is had by its registered name."""


def imported(package: Path) -> Iterator[tuple[str, str]]:
    """Each file of a package, with each top-level package that it imports."""
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
            else:
                continue
            yield from ((str(file.relative_to(ROOT)), name.partition(".")[0]) for name in names)


@pytest.mark.parametrize("plugin", [path.name for path in PLUGINS])
def test_no_plugin_imports_another(plugin: str) -> None:
    others = ({path.name for path in PLUGINS} | REGISTERED) - {plugin}
    assert [(file, name) for file, name in imported(ROOT / "plugins" / plugin) if name in others] == []


def test_the_engine_imports_no_plugin() -> None:
    found = [(file, name) for file, name in imported(ROOT / "metaopt") if name.startswith("metaopt_")]
    assert found == []
