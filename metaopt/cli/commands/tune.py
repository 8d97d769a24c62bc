"""``metaopt tune`` and ``metaopt worker``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Backend, Device, Seed, check_device, parse_settings

Batch = Annotated[int, typer.Option(help="Trials that train together in this process.", min=1)]
Grace = Annotated[
    float, typer.Option(help="Seconds without a sign of life until another process's trials are run again.", min=0)
]
_OF_OPTUNA = (
    "sampler", "pruner", "objectives", "limit", "batch", "top", "confirm_seeds", "select_on", "storage", "study",
)  # fmt: skip
"""Options that the methods of populations do not read."""


def tune(
    context: typer.Context,
    optimizer: Annotated[str, typer.Argument(metavar="OPT", help="As for metaopt race: a name, FILE.py:RULE, ...")],
    task: Annotated[str, typer.Option(help="What to train (metaopt list tasks).")] = "digits_mlp",
    trials: Annotated[int, typer.Option(help="Trials that are to finish, by all processes together.", min=1)] = 100,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=LOW:HIGH]",
            help="What to search, may be given several times: lr, lr=1e-4:1e-1, beta2; of options nesterov=False,True or "
            "ns_steps=1:8. Default: all hyperparameters with a search range.",
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="A schedule of lr, or several to choose from: constant,linear,cosine,wsd.")
    ] = "",
    by_role: Annotated[
        bool, typer.Option("--by-role", help="Search learning rates per role of parameters too.")
    ] = False,
    method: Annotated[str, typer.Option(help="optuna; or of populations: pbt, cross-entropy.")] = "optuna",
    sampler: Annotated[str, typer.Option(help="tpe, random, qmc, gp, cmaes or nsga2.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="lockstep, median, patient, asha, hyperband or none.")] = "lockstep",
    objectives: Annotated[str, typer.Option(help="What to minimise: loss, or loss,time,memory.")] = "loss",
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Upper limit: time=2.5 (s) or memory=1e6 (bytes).")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Training runs per trial.", min=1)] = 2,
    steps: Annotated[int | None, typer.Option(help="Length of a run; default: the task's horizon.", min=1)] = None,
    units: Annotated[int | None, typer.Option(help="Looks at a learning curve; must divide the steps.", min=1)] = None,
    batch: Batch = 16,
    top: Annotated[int, typer.Option(help="Best trials to train again from fresh seeds.", min=1)] = 5,
    confirm_seeds: Annotated[int, typer.Option(help="How many fresh seeds.", min=1)] = 8,
    select_on: Annotated[
        str | None, typer.Option(help="Choose among the best on another task, such as a wider model under muP.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A value of the rule that is not searched.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the search; one that holds a search goes on.")] = Path(
        "runs/tune"
    ),
    storage: Annotated[
        str | None,
        typer.Option(
            help="journal:PATH, sqlite:///PATH, postgresql://..., grpc://HOST:PORT; default: a journal in OUT."
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; default: OPT on TASK.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    backend: Backend = "auto",
) -> None:
    """Tune an optimizer's hyperparameters on a task; running the same command again goes on.

    Example: [bold]metaopt tune adamw --task digits_mlp --trials 100 --out runs/tune[/bold]
    """
    from rich.console import Console

    from metaopt.tune import population
    from metaopt.tune.search_space import ALL
    from metaopt.tune.tuning import TuneConfig, require_optuna
    from metaopt.tune.tuning import tune as run

    fixed = parse_settings(settings or [])
    if schedule and "," not in schedule:
        fixed["schedule"] = schedule
    wrappers = [name for name, wanted in (("by_role", by_role), ("scheduled", schedule)) if wanted]
    config = TuneConfig(
        optimizer, task, trials=trials, wrappers=tuple(wrappers), fixed=fixed,
        search=(*(search or [ALL]), *([f"schedule={schedule}"] if "," in schedule else [])),
        seeds=seeds, steps=steps, units=units, sampler=sampler, pruner=pruner,
        objectives=tuple(objectives.split(",")), constraints=parse_settings(limit or []),
        seed=seed, device=check_device(device), backend=backend,
    )  # fmt: skip
    console = Console(stderr=True, soft_wrap=True)
    if method != "optuna":
        sources = {name: context.get_parameter_source(name) for name in _OF_OPTUNA}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        unread = [f"--{name.replace('_', '-')}" for name in given]
        if unread:
            raise ValueError(f"--method {method} does not read {', '.join(unread)}; leave it out")
        console.print(population.run(method, config, out))
        return
    require_optuna()
    from metaopt.tune import report

    try:
        result = run(
            config,
            out,
            storage=storage,
            name=study,
            batch=batch,
            top=top,
            confirm_seeds=confirm_seeds,
            select_on=select_on,
        )
    except KeyboardInterrupt:
        console.print("stopped; what has finished is kept, and the same command goes on")
        raise
    console.print(report.table(result.problem, result.study, result.selection))
    console.print(
        f"written to [bold]{out}[/bold]; next: metaopt race {out}/{report.BEST_FILE} {optimizer} --tasks {select_on or task}"
    )


def worker(
    storage: Annotated[
        str, typer.Option(help="Of the study: journal:PATH, sqlite:///PATH, postgresql://..., grpc://...")
    ],
    study: Annotated[str, typer.Option(help="Its name.")],
    batch: Batch = 16,
    grace: Grace = 60.0,
    trials: Annotated[int | None, typer.Option(help="Another budget than that of metaopt tune.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute here; default: as metaopt tune.")] = None,
) -> None:
    """Take part in a study that metaopt tune has started, on this machine or another, until its trials are finished.

    Example: [bold]metaopt worker --storage postgresql://me@host/studies --study "adamw on digits_mlp"[/bold]
    """
    from rich.console import Console

    from metaopt.tune.tuning import join, require_optuna

    require_optuna()
    finished = join(storage, study, trials=trials, batch=batch, grace=grace, device=device and check_device(device))
    Console(stderr=True).print(f"the study is complete; {finished} trials were finished here")
