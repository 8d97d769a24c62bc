"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import ast
from typing import Annotated, Any

import typer

Seed = Annotated[int, typer.Option("--seed", help="Determines every random number.", min=0)]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")]
Backend = Annotated[str, typer.Option("--backend", help="How the unroll runs (metaopt list backends), or auto.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change an option; may be given several times.")
]


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["hidden=32", "betas=(0.9, 0.95)"]`` -> values; text that is no Python literal stays text.

    Raises:
        ValueError: an item without ``=``.
    """
    values = {}
    for item in settings:
        name, equals, text = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"{item!r} must look like NAME=VALUE, for example hidden=32")
        try:
            values[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name.strip()] = text
    return values


def check_device(device: str) -> str:
    """``device``, if torch has it here.

    Raises:
        ValueError: an unknown device, or one that this machine lacks.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not to be had here ({reason}); cpu always is") from None
    return device
