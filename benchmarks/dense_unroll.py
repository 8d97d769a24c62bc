"""Whole training runs in one call: the digits MLP (64-32-10, batch 64) with Adam in C++, beside JAX's ``jit(vmap(scan))``.

    python benchmarks/dense_unroll.py [--copies 1 16 64] [--steps 100] [--out FILE.json]

One core. Both sides train the same copies from the same parameters on the same examples, and the losses of the two are
compared first. They take turns; a figure is the best of its rounds, in inner steps per second of CPU time. An inner step is
loss, gradient and update of one copy. Where JAX is absent a message says so, and its column is empty.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metaopt import registry
from metaopt.random import sample_indices
from metaopt.rule import UpdateRule
from metaopt.task import Task
from metaopt.unroll import Carry, start, unroll

ROUNDS = 10


def ours(task: Task, rule: UpdateRule, carry: Carry, steps: int, backend: str) -> Callable[[], Any]:
    """A call that trains all copies and gives their losses."""

    def run() -> Tensor:
        with torch.no_grad():
            return unroll(task, rule, carry, steps, backend=backend)[0]

    return run


def by_jax(task: Task, rule: UpdateRule, carry: Carry, steps: int) -> Callable[[], Any] | None:
    """The same in JAX, compiled; None where JAX is absent."""
    try:
        import jax
        import jax.numpy as jnp
    except ModuleNotFoundError:
        return None
    examples = task.train.tensors
    images, labels = jnp.asarray(examples["input"].flatten(1).numpy()), jnp.asarray(examples["label"].numpy())
    params = {name: jnp.asarray(p.numpy()) for name, p in carry.params.items()}
    copies, (beta1, beta2) = len(carry.seeds), rule.hp["betas"]
    at = torch.arange(steps).repeat(copies)
    drawn = sample_indices(carry.seeds.repeat_interleave(steps), at, task.batch_size, len(task.train))
    indices = jnp.asarray(drawn.reshape(copies, steps, task.batch_size).numpy().astype(np.int32))

    def loss(p: Any, x: Any, y: Any) -> Any:
        h = jax.nn.relu(x @ p["fc1.weight"].T + p["fc1.bias"])
        logits = h @ p["fc2.weight"].T + p["fc2.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def step(run: Any, rows: Any) -> Any:
        p, m, v, t = run
        value, g = jax.value_and_grad(loss)(p, images[rows], labels[rows])
        t = t + 1
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, m, g)
        v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, v, g)

        def moved(p: Any, m: Any, v: Any) -> Any:
            return p - rule.hp["lr"] * (m / (1 - beta1**t)) / (jnp.sqrt(v / (1 - beta2**t)) + rule.hp["eps"])

        return (jax.tree.map(moved, p, m, v), m, v, t), value

    def train(p: Any, rows: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, p)
        return jax.lax.scan(step, (p, zeros, zeros, 0.0), rows)

    compiled = jax.jit(jax.vmap(train))
    return lambda: jax.block_until_ready(compiled(params, indices))[1]


def steps_per_second(runs: dict[str, Callable[[], Any]], inner_steps: int) -> dict[str, float]:
    """Of each, which take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - began)
    return {name: inner_steps / seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dense_unroll.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task, rule = registry.create("task", "digits_mlp"), registry.create("optimizer", "adam")
    console = Console()
    table = Table(title=f"inner steps per CPU-second, digits MLP, Adam, windows of {given.steps}, one core")
    for column in ("copies", "eager", "fused", "jax", "fused / jax"):
        table.add_column(column, justify="right")
    rows = []
    for copies in given.copies:
        carry = start(task, rule, list(range(copies)))
        runs = {backend: ours(task, rule, carry, given.steps, backend) for backend in ("eager", "fused")}
        peer = by_jax(task, rule, carry, given.steps)
        if peer is None:
            console.print("jax is not installed, so it is left out: pip install jax")
        else:
            runs["jax"] = peer
        losses = {name: np.asarray(run()) for name, run in runs.items()}
        for name, found in losses.items():
            np.testing.assert_allclose(found, losses["eager"], rtol=1e-3, err_msg=f"{name} trains otherwise than eager")
        speeds = steps_per_second(runs, copies * given.steps)
        ratio = speeds["fused"] / speeds["jax"] if "jax" in speeds else None
        cells = [f"{speeds[name]:,.0f}" if name in speeds else "" for name in ("eager", "fused", "jax")]
        table.add_row(str(copies), *cells, "" if ratio is None else f"{ratio:.2f}")
        rows.append({"copies": copies, "steps_per_second": speeds, "fused_to_jax": ratio})
    console.print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine(), "steps": given.steps, "rows": rows}, indent=2) + "\n")
    console.print(f"written: {given.out}")


if __name__ == "__main__":
    main()
