"""``metaopt meta-train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Backend, Device, Seed, check_device, parse_settings


def meta_train(
    learned: Annotated[
        str, typer.Argument(help="A learned optimizer (metaopt list learned-optimizers).")
    ] = "small_fc_lopt",
    task: Annotated[str, typer.Option(help="The inner problem (metaopt list tasks).")] = "digits_mlp",
    estimator: Annotated[str, typer.Option(help="The meta-gradient (metaopt list estimators).")] = "pes",
    out: Annotated[Path, typer.Option(help="Directory of the run; one that holds a run is resumed.")] = Path(
        "runs/meta"
    ),
    steps: Annotated[int, typer.Option(help="Outer steps.", min=1)] = 1000,
    horizon: Annotated[int | None, typer.Option(help="Inner steps of an episode; default: the task's.", min=1)] = None,
    lr: Annotated[float, typer.Option(help="Peak outer learning rate.")] = 1e-3,
    outer_rule: Annotated[str, typer.Option(help="What updates theta (metaopt list optimizers).")] = "adam",
    set_learned: Annotated[
        list[str] | None,
        typer.Option("--set-learned", metavar="NAME=VALUE", help="An option of the learned optimizer."),
    ] = None,
    set_task: Annotated[
        list[str] | None, typer.Option("--set-task", metavar="NAME=VALUE", help="... of the task.")
    ] = None,
    set_estimator: Annotated[
        list[str] | None, typer.Option("--set-estimator", metavar="NAME=VALUE", help="... of the estimator.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Outer steps between checkpoints.", min=1)] = 100,
    seed: Seed = 0,
    device: Device = "cpu",
    backend: Backend = "auto",
) -> None:
    """Meta-train a learned optimizer; running the same command again resumes it.

    Example: [bold]metaopt meta-train small_fc_lopt --task digits_mlp --steps 500 --lr 0.01
    --set-learned step_scale=0.01 --out runs/lopt[/bold]
    """
    from rich.console import Console

    from metaopt.meta.trainer import MetaTrainConfig
    from metaopt.meta.trainer import meta_train as run

    config = MetaTrainConfig(
        learned=learned, learned_options=parse_settings(set_learned or []),
        task=task, task_options=parse_settings(set_task or []),
        estimator=estimator, estimator_options=parse_settings(set_estimator or []),
        horizon=horizon, outer_steps=steps, outer_rule=outer_rule, outer_lr=lr, seed=seed,
        device=check_device(device), backend=backend, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    result = run(config, out)
    first, last = result.progress
    console = Console()
    console.print(f"meta-loss {first:.4f} in the first tenth of {steps} outer steps, {last:.4f} in the last")
    console.print(f"theta, metrics, config and checkpoint are in [bold]{out}[/bold]; try: metaopt race {out} adamw")
