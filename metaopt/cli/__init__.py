"""The command ``metaopt``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    What the user got wrong is one line on stderr and code 2; ``METAOPT_TRACEBACK=1`` shows where it was raised.
    """
    # Read when torch loads. Threads that spin while they wait make small operations ten times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import typer

    from metaopt.cli.app import app

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], prog_name="metaopt", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        print("metaopt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("METAOPT_TRACEBACK", "0") != "0":
            raise
        message = _users_mistake(error)
        if message is None:
            raise
        print(f"metaopt: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _users_mistake(error: Exception) -> str | None:
    """The message of an error that bad input causes; None for a defect of ours, which deserves its traceback."""
    # typer's own errors have no public base class, and another one in each major version
    usage = getattr(error, "format_message", None)
    if callable(usage):
        return str(usage())
    if isinstance(error, (ValueError, TypeError, OSError)):
        return str(error) or type(error).__name__
    return None
