"""Writing what a user made so that a crash, of the process or the machine, never leaves half of it."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_ABANDONED = 3600.0  # seconds after which a temporary file's writer is surely gone


def write_atomic(path: Path | str, write: bytes | str | Callable[[Path], None]) -> Path:
    """Write ``path`` through a temporary file beside it; readers see the old content or the new, never a part.

    Temporary files that killed processes left are removed by the next write of the same path, an hour later or more.

    Args:
        path: the file; missing parent directories are made.
        write: the content, or a function that writes the file it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(FileNotFoundError):  # another process's, which has just finished with it
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(write):
            write(temporary)
        else:
            temporary.write_bytes(write.encode() if isinstance(write, str) else write)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        _to_disk(temporary)  # else a power cut may leave the new name without the content
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere directories cannot be opened
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
