"""``metaopt meta-tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Settings, check_device, parse_settings


def meta_tune(
    config: Annotated[Path, typer.Argument(help="TOML file of meta-training settings (docs/meta-training.md).")],
    out: Annotated[Path, typer.Option(help="Directory of the search; one that holds a search goes on.")] = Path(
        "runs/meta-tune"
    ),
    trials: Annotated[int, typer.Option(help="Meta-training runs; of each generation.", min=1)] = 20,
    generations: Annotated[int, typer.Option(help="Of population-based training; 1: a plain study.", min=1)] = 1,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW:HIGH",
            help="A setting to search, such as outer_lr=1e-4:1e-1 or estimator_options.pairs=4:64 (integers).",
            show_default="outer_lr, sigma, clip_norm",
        ),
    ] = None,
    settings: Settings = [],  # noqa: B006 - typer copies it
) -> None:
    """Search hyperparameters of meta-training with Optuna; running the same command again goes on.

    Example: [bold]metaopt meta-tune lopt.toml --trials 20 --search outer_lr=1e-4:1e-1 --out runs/search[/bold]
    """
    from rich.console import Console

    from metaopt.meta.config import make_config, read_settings
    from metaopt.meta.tune import SPACE
    from metaopt.meta.tune import meta_tune as run

    chosen = make_config(read_settings(config) | parse_settings(settings))
    check_device(chosen.device)
    space = dict(map(_range, search)) if search else SPACE
    result = run(chosen, out, trials=trials, generations=generations, space=space)
    found = ", ".join(f"{name}={value:.4g}" for name, value in result.settings.items())
    console = Console(soft_wrap=True)
    console.print(f"best score {result.score:.3f} with {found}; its theta is in [bold]{result.directory}[/bold]")


def _range(text: str) -> tuple[str, tuple[float, float]]:
    name, _, ends = text.partition("=")
    try:
        low, high = (int(end) if end.isdecimal() else float(end) for end in ends.split(":"))
    except ValueError:
        raise ValueError(f"{text!r} must look like NAME=LOW:HIGH, for example outer_lr=1e-4:1e-1") from None
    return name, (low, high)
