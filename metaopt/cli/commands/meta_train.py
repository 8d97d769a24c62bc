"""``metaopt meta-train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import check_device, parse_settings


def meta_train(
    learned: Annotated[
        str | None,
        typer.Argument(help="A learned optimizer (metaopt list learned-optimizers).", show_default="small_fc_lopt"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; what is given beside it comes before it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run; one that holds a run is resumed.")] = Path(
        "runs/meta"
    ),
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="An inner problem (metaopt list tasks), or suite:NAME; may be given several times.",
            show_default="digits_mlp",
        ),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="The meta-gradient (metaopt list estimators).", show_default="pes")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Outer steps.", min=1, show_default="1000")] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Inner steps of an episode.", min=1, show_default="the task's")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak outer learning rate.", show_default="0.001")] = None,
    outer_rule: Annotated[
        str | None, typer.Option(help="What updates theta (metaopt list optimizers).", show_default="adam")
    ] = None,
    init_theta: Annotated[
        str | None, typer.Option("--from", help="Begin with the theta of a run's directory.", show_default="fresh")
    ] = None,
    evaluate_on: Annotated[
        list[str] | None, typer.Option(help="A task or suite:NAME to choose the best theta by; needs --evaluate-every.")
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Outer steps between evaluations.", min=1)] = None,
    set_learned: Annotated[
        list[str] | None,
        typer.Option("--set-learned", metavar="NAME=VALUE", help="An option of the learned optimizer."),
    ] = None,
    set_task: Annotated[
        list[str] | None, typer.Option("--set-task", metavar="NAME=VALUE", help="... of every task given by --task.")
    ] = None,
    set_estimator: Annotated[
        list[str] | None, typer.Option("--set-estimator", metavar="NAME=VALUE", help="... of the estimator.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting (docs/meta-training.md lists them)."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Outer steps between checkpoints.", min=1, show_default="100")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    seed: Annotated[int | None, typer.Option(help="Determines every random number.", min=0, show_default="0")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...", show_default="cpu")] = None,
    backend: Annotated[
        str | None, typer.Option(help="How the unroll runs (metaopt list backends).", show_default="auto")
    ] = None,
) -> None:
    """Meta-train a learned optimizer; running the same command again resumes it.

    Example: [bold]metaopt meta-train small_fc_lopt --task digits_mlp --steps 500 --lr 0.01
    --set-learned step_scale=0.01 --out runs/lopt[/bold]
    """
    from rich.console import Console

    from metaopt.meta.config import TaskChoice, make_config, read_settings
    from metaopt.meta.distributed import process_group
    from metaopt.meta.trainer import meta_train as run
    from metaopt.suite import listed

    if set_task and not task:
        raise ValueError("--set-task goes with --task; in a TOML file write tasks = [{name = ..., options = {...}}]")
    flags = {
        "learned": learned,
        "learned_options": parse_settings(set_learned or []),
        "tasks": [TaskChoice(name, parse_settings(set_task or [])) for name in listed(task or [])],
        "estimator": estimator,
        "estimator_options": parse_settings(set_estimator or []),
        "outer_steps": steps,
        "horizon": horizon,
        "outer_lr": lr,
        "outer_rule": outer_rule,
        "init_theta": init_theta,
        "evaluate_on": evaluate_on,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "device": device,
        "backend": backend,
    }
    values = (read_settings(config) if config else {}) | parse_settings(settings or [])
    for name, value in flags.items():
        if value not in (None, [], {}):
            there = values.get(name)
            values[name] = there | value if isinstance(there, dict) and isinstance(value, dict) else value
    chosen = make_config(values)
    with process_group(chosen.device) as shard:
        check_device(chosen.device)  # by now each process has a GPU of its own
        result = run(chosen, out, tensorboard=tensorboard, shard=shard, progress=shard.rank == 0)
    if shard.rank:
        return
    first, last = result.progress
    console = Console(soft_wrap=True)
    console.print(
        f"meta-loss {first:.4f} in the first tenth of {len(result.metrics)} outer steps, {last:.4f} in the last"
    )
    if result.best is not None:
        console.print(f"best score {result.best[0]:.3f} after outer step {result.best[1]}; that theta was kept")
    diverged = sum(result.diverged.values())
    if diverged or result.skipped:
        console.print(f"{diverged} copies diverged and were left out; {result.skipped} outer steps changed nothing")
    console.print(f"theta, metrics, config and checkpoint are in [bold]{out}[/bold]; try: metaopt race {out} adamw")
