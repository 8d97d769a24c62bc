"""Generated Triton modules: written to the cache directory and imported from there, for Triton reads a kernel's source file."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

from metaopt.files import write_atomic
from metaopt.program.build import cache_directory


def load_module(text: str, name: str) -> ModuleType:
    """The module that ``text`` is, from ``<name>-<hash of the text>.py`` in the cache directory.

    Args:
        text: Python source of our own making, from validated names only: it is run.
        name: what the kernels in it do, for file names and stack traces.

    Returns:
        The module; the same one for the same text while the process lives.

    Raises:
        OSError: the cache directory (``METAOPT_CACHE_DIR``, default ``~/.cache/metaopt``) cannot be written.
    """
    return _module(text, name, cache_directory())


@functools.lru_cache(maxsize=1024)
def _module(text: str, name: str, directory: Path) -> ModuleType:
    path = directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomic(path, text)
    spec = importlib.util.spec_from_file_location(f"metaopt_kernels.generated.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
