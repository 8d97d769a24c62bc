"""``metaopt demo``: the whole platform once, on real data, in a few minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli.commands.options import Device, Seed, check_device

TRANSFER_TASKS = ("digits_conv", "char_lm")
STEPS = 200


def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything that the demo makes.")] = Path("demo-output"),
    outer_steps: Annotated[int, typer.Option(help="Outer steps of meta-training.", min=1)] = 200,
    seeds: Annotated[int, typer.Option(help="Final runs per contender and task in the race.", min=1)] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Meta-train a learned optimizer, race it on tasks that it never saw, export it, and train with the exported file.

    Example: [bold]metaopt demo --out demo-output[/bold]
    """
    import subprocess
    import sys
    import time

    import torch
    from rich.console import Console

    from metaopt.evaluate import race, save, table
    from metaopt.export import write_module
    from metaopt.meta.trainer import MetaTrainConfig, meta_train
    from metaopt.resolve import resolve_rule

    console, began = Console(), time.monotonic()
    config = MetaTrainConfig(
        learned="small_fc_lopt", learned_options={"step_scale": 0.01},
        tasks=["digits_mlp"], horizon=STEPS,
        estimator="pes", estimator_options={"pairs": 16, "window": 20, "sigma": 0.01},
        outer_steps=outer_steps, outer_lr=0.01, seed=seed, device=check_device(device),
    )  # fmt: skip
    console.rule("1. meta-train a learned optimizer on MLPs that classify 8x8 digits")
    console.print(f"PES, 16 antithetic pairs, windows of 20 steps of {STEPS}-step runs, {outer_steps} outer steps")
    result = meta_train(config, out / "lopt")
    first, last = result.progress
    console.print(
        f"mean normalised training loss of the inner runs: {first:.3f} in the first tenth, {last:.3f} in the last"
    )

    console.rule(f"2. race it against tuned baselines on tasks that it never saw: {', '.join(TRANSFER_TASKS)}")
    contenders = {
        "learned": resolve_rule(str(out / "lopt")),
        "adamw": resolve_rule("adamw"),
        "lion": resolve_rule("lion"),
        "sgd-momentum": resolve_rule("momentum"),
    }
    raced = race(contenders, TRANSFER_TASKS, seeds=seeds, steps=STEPS, seed=seed, device=device)
    written = save(raced, out / "race")
    console.print(table(raced))
    console.print("written: " + ", ".join(str(path) for path in written.values()))

    console.rule("3. export it, and train with the file in an interpreter that has no metaopt")
    exported = write_module(contenders["learned"], "LearnedOptimizer", out / "learned_optimizer.py")
    script = Path(__file__).parents[1] / "standalone_training.py"
    site_packages = Path(torch.__file__).parents[1]
    arguments = [sys.executable, "-I", "-S", str(script), str(exported), str(site_packages), "300"]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    if finished.returncode:
        raise RuntimeError(f"training with the exported file failed:\n{finished.stderr}")
    console.print(finished.stdout.strip(), soft_wrap=True)
    console.print(f"done in {time.monotonic() - began:.0f} s; everything is in [bold]{out}[/bold]")
