"""Keys of paid proposers: named by environment variables, and struck out of every text that is kept or sent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"[A-Za-z0-9_]*(KEY|TOKEN|SECRET|PASSWORD)[A-Za-z0-9_]*", re.IGNORECASE)
_SHORTEST = 8  # shorter values ("none", "EMPTY") are placeholders; striking them out would maim texts


def require_key_name(key_env: str) -> str:
    """``key_env``, if `redact` knows such variables as secret.

    Raises:
        ValueError: no such name; a key itself, say.
    """
    if not _SECRET_NAME.fullmatch(key_env):
        raise ValueError(
            "key_env must be the name of an environment variable, with KEY, TOKEN, SECRET or PASSWORD in it so that its value "
            "is known as a secret, such as OPENAI_API_KEY; what was given is not shown, as it may be a key"
        )
    return key_env


def redact(text: str) -> str:
    """``text`` without the values of environment variables whose names have KEY, TOKEN, SECRET or PASSWORD in them."""
    secrets = {
        value: name for name, value in os.environ.items() if _SECRET_NAME.fullmatch(name) and len(value) >= _SHORTEST
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, f"[{secrets[value]}]")
    return text


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` for a child process, without the variables that `redact` strikes out."""
    return {name: value for name, value in environment.items() if not _SECRET_NAME.fullmatch(name)}
