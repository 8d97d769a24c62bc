"""``metaopt bilevel``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Seed, Settings, parse_settings


def bilevel(
    problem: Annotated[str, typer.Argument(help="A bilevel problem (metaopt list problems), or FILE.py:PROBLEM.")],
    method: Annotated[str, typer.Option(help="Of the hypergradient (metaopt list hypergradients).")] = "auto",
    outer_steps: Annotated[
        int | None, typer.Option(help="Outer steps.", min=1, show_default="the problem's own")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Outer learning rate.", show_default="the problem's own, for adam")
    ] = None,
    rule: Annotated[str, typer.Option(help="What moves the hyperparameters (metaopt list optimizers).")] = "adam",
    start: Annotated[str, typer.Option(help="cold: each outer step trains anew; warm: it goes on.")] = "cold",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Solve the inner problem to this gradient norm, times 0.9 after each outer step."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run; one that holds a run is resumed.")] = Path(
        "runs/bilevel"
    ),
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006 - typer copies it
    set_method: Annotated[
        list[str] | None, typer.Option("--set-method", metavar="NAME=VALUE", help="An option of the method.")
    ] = None,
) -> None:
    """Learn the hyperparameters of a training run by gradient; running the same command again goes on, with more
    --outer-steps beyond the end.

    --set gives the problem's own arguments.

    Example: [bold]metaopt bilevel hyper_cleaning --method unroll --set corrupted=0.3 --out runs/cleaning[/bold]
    """
    from rich.console import Console
    from rich.progress import Progress

    from metaopt import registry
    from metaopt.tune.outer import CHECKPOINT_FILE, Line, OuterConfig, solve
    from metaopt.tune.problem import BilevelProblem

    made = registry.create("problem", problem, **parse_settings(settings))
    if not isinstance(made, BilevelProblem):
        raise ValueError(f"{problem} gives a {type(made).__name__}, not a metaopt.tune.problem.BilevelProblem")
    config = OuterConfig(
        method,
        parse_settings(set_method or []),
        made.outer_steps if outer_steps is None else outer_steps,
        rule,
        made.outer_lr if lr is None else lr,
        start=start,
        tolerance=tolerance,
        seed=seed,
    )
    console = Console(stderr=True)
    if (out / CHECKPOINT_FILE).exists():
        console.print(f"going on with what {out} holds")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("outer steps", total=config.steps)

        def show(line: Line) -> None:
            progress.update(bar, completed=line["step"], description=f"outer objective {line['outer']:.4g}")

        result = solve(made, config, out, on_step=show)
    console = Console(soft_wrap=True, highlight=False)
    first, kept = result.history[0], f"{result.outer:.4g} after outer step {result.step}, which is kept"
    console.print(f"outer objective {first['outer']:.4g} at the start, {kept}")
    console.print(f"method {first['diagnostics'].get('method', method)}: {first['diagnostics'].get('why', 'as asked')}")
    if result.gap is not None:
        console.print(
            f"on the third split {result.holdout:.4g}, a gap of {result.gap:.3g} (of {result.last_gap:.3g} after all steps)"
        )
    for name, value in result.report.items():
        console.print(f"{name} {value:.4g}")
    console.print(f"hyperparameters, history and checkpoint are in [bold]{out}[/bold]")
