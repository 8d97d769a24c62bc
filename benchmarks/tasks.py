"""Inner steps per CPU-second of every task family: K copies as the unroll runs them, against a loop over single runs.

    python benchmarks/tasks.py [--copies 1 16 64] [--families mlp_classifier ...] [--compile FAMILY ...] [--out FILE.json]

One core, AdamW, the first named member of each family. ``looped`` is what a tutorial does: one run at a time, autograd and
``torch.optim.AdamW(fused=True)``. With jax installed, the digits MLP with Adam also runs as ``jax.vmap`` of ``lax.scan``, on
one core too, in this process. An inner step is loss, gradient and update of one training run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from report import machine
from rich.console import Console
from rich.table import Table

from metaopt import registry
from metaopt.random import sample_indices, step_keys
from metaopt.task import Task
from metaopt.unroll import start, unroll

ROUNDS, SECONDS_PER_ROUND = 3, 0.25
COMPILED = ["mlp_classifier", "quadratic", "conv", "rnn_lm", "transformer_lm"]


def looped(task: Task) -> float:
    """One run at a time, the plain way; steps per CPU-second."""
    params = {name: p.requires_grad_() for name, p in task.init(torch.Generator().manual_seed(0)).items()}
    buffers, seed = task.buffers(), torch.zeros(1, dtype=torch.int64)
    optimizer = torch.optim.AdamW(params.values(), fused=True)
    done = 0

    def run(steps: int) -> None:
        nonlocal buffers, done
        at = torch.arange(done, done + steps)  # indices of all steps at once, as the unroll draws them
        indices = sample_indices(seed.expand(steps), at, task.batch_size, len(task.train))
        keys = step_keys(seed.expand(steps), at)
        for t in range(steps):
            batch = task.train.take(indices[t]) | ({"random": keys[t]} if task.stochastic else {})
            optimizer.zero_grad()
            loss, buffers = task.training_loss(params, buffers, batch)
            loss.backward()
            optimizer.step()
        done += steps

    return _steps_per_second(run, 1)


@torch.no_grad()
def ours(task: Task, copies: int, backend: str, optimizer: str = "adamw") -> float:
    """Steps per CPU-second of all copies together."""
    rule = registry.create("optimizer", optimizer)
    carry = start(task, rule, list(range(copies)))

    def run(steps: int) -> None:
        unroll(task, rule, carry, steps, backend=backend)

    return _steps_per_second(run, copies)


def jax_digits_mlp(copies: int) -> float | None:
    """The digits MLP with Adam as ``jax.jit(vmap(scan))`` on device-resident data; None without jax."""
    try:
        import jax
        import jax.numpy as jnp
    except ModuleNotFoundError:
        return None
    task = registry.create("task", "digits_mlp")
    images, labels = (jnp.asarray(t.numpy()) for t in task.train.tensors.values())
    images = images.reshape(len(images), -1)
    singles = [task.init(torch.Generator().manual_seed(k)) for k in range(copies)]
    params = {name: jnp.stack([jnp.asarray(p[name].numpy()) for p in singles]) for name in singles[0]}

    def loss(p: Any, x: Any, y: Any) -> Any:
        h = jax.nn.relu(x @ p["fc1.weight"].T + p["fc1.bias"])
        logits = h @ p["fc2.weight"].T + p["fc2.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def step(carry: Any, key: Any) -> Any:
        p, m, v, t = carry
        rows = jax.random.randint(key, (task.batch_size,), 0, len(images))
        value, g = jax.value_and_grad(loss)(p, images[rows], labels[rows])
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        p = jax.tree.map(lambda p, m, v: p - 1e-3 * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), p, m, v)
        return (p, m, v, t), value

    zeros = jax.tree.map(jnp.zeros_like, params)

    def train(p: Any, m: Any, v: Any, key: Any) -> Any:
        return jax.lax.scan(step, (p, m, v, 0.0), jax.random.split(key, 20))

    compiled = jax.jit(jax.vmap(train))
    keys = jax.random.split(jax.random.key(0), copies)

    def run(steps: int) -> None:
        for _ in range(max(1, steps // 20)):
            jax.block_until_ready(compiled(params, zeros, zeros, keys))

    return _steps_per_second(run, copies, multiple=20)


def _steps_per_second(run: Callable[[int], None], copies: int, multiple: int = 1) -> float:
    def timed(steps: int) -> float:
        began = time.process_time()
        run(steps)
        return time.process_time() - began

    timed(2 * multiple)  # compile, warm caches
    once = timed(2 * multiple) / (2 * multiple)
    steps = max(2, int(SECONDS_PER_ROUND / max(once, 1e-6)) // multiple) * multiple
    return statistics.median(copies * steps / timed(steps) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    specs = {name: spec for name, spec in registry.specs("task").items() if spec.facts.get("family")}
    first = {}
    for name, spec in sorted(specs.items(), key=lambda item: item[1].facts.get("parameters") or 0):
        first.setdefault(spec.facts["family"], name)
    first |= {
        "mlp_classifier": "digits_mlp",
        "conv": "digits_conv",
        "transformer_lm": "char_lm",
    }  # the field's usual ones
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--families", nargs="+", default=sorted(first))
    parser.add_argument(
        "--compile", nargs="*", default=COMPILED, help="families that torch.compile runs too: a minute each"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tasks.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    backends = ["auto", "eager", "compile"]
    console = Console(width=140 if not sys.stdout.isatty() else None)
    table = Table(title="inner steps per CPU-second on one core, and the ratio to looping over plain torch")
    for column in ("family", "task", "looped", *(f"{b} K={k}" for b in backends for k in given.copies)):
        table.add_column(column, justify="left" if column in ("family", "task") else "right")
    rows = []
    for family in given.families:
        name = first[family]
        task = registry.create("task", name)
        peer = looped(task)
        speeds: dict[str, dict[int, float | str]] = {}
        for backend in backends:
            for k in given.copies if backend != "compile" or family in given.compile else []:
                try:
                    speeds.setdefault(backend, {})[k] = ours(task, k, backend)
                except Exception as error:  # a task that torch.compile cannot take is a result too
                    if backend != "compile":
                        raise
                    speeds.setdefault(backend, {})[k] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        cells = [speeds.get(b, {}).get(k, "") for b in backends for k in given.copies]
        table.add_row(family, name, f"{peer:,.0f}", *(_cell(cell, peer) for cell in cells))
        console.print(f"{family}: " + ", ".join(_cell(cell, peer) for cell in cells), style="dim")
        rows.append({"family": family, "task": name, "looped": peer, "steps_per_second": speeds})
    console.print(table)
    versus = {}
    for k in [k for k in given.copies if k > 1 and "mlp_classifier" in given.families]:
        peer_speed = jax_digits_mlp(k)
        if peer_speed is not None:
            mine = ours(registry.create("task", "digits_mlp"), k, "compile", "adam")
            versus[k] = {"jax": peer_speed, "metaopt": mine}
            console.print(f"digits_mlp, Adam, K={k}: jax vmap + scan {peer_speed:,.0f}, compile {mine:,.0f}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "unit": "inner steps per CPU-second, one core",
        "rows": rows,
        "digits_mlp_adam": versus,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written: {given.out}")


def _cell(speed: float | str, peer: float) -> str:
    return ("no" if speed else "") if isinstance(speed, str) else f"{speed:,.0f} ({speed / peer:.1f}x)"


if __name__ == "__main__":
    main()
