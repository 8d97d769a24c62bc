"""What this plugin offers: every entry beside this file."""

from __future__ import annotations

from pathlib import Path

from metaopt.hookspecs import Spec, hookimpl
from metaopt.zoo import entries


@hookimpl
def metaopt_zoo_rules() -> list[Spec]:
    """Trained weights and found losses, with their cards."""
    return entries(Path(__file__).parent)
