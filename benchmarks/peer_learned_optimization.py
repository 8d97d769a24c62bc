"""google/learned_optimization at the work of meta_train.py: inner steps per CPU-second, and seconds to its first outer step.

    python benchmarks/peer_learned_optimization.py RULE [--pairs 16] [--rounds 9]

`versions` and `measure` start a process of their own: XLA reads its number of threads when it is imported, and the first
outer step counts imports and compilation. The library's interface is that of its wheel on PyPI, 0.0.1, or of its repository
since 2022, where the truncated step is an object of its own; this was run with 0.0.1 only, on JAX 0.10.2 with shims.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from typing import Any

WINDOW, EPISODE, BATCH = 20, 100, 64
RULES: dict[str, tuple[str, str, dict[str, int]]] = {
    "MLPLOpt": ("mlp_lopt", "MLPLOpt", {}),
    "AdafacMLP, hidden 4": ("adafac_mlp_lopt", "AdafacMLPLOpt", {"hidden_size": 4}),
    "AdafacMLP, hidden 32": ("adafac_mlp_lopt", "AdafacMLPLOpt", {"hidden_size": 32}),
}
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "JAX_PLATFORMS": "cpu"}


def versions() -> dict[str, str]:
    """What would be measured; an ``ImportError`` says why nothing can be."""
    command = [sys.executable, "-c", "from learned_optimization.outer_trainers import truncated_pes"]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    if found.returncode:
        raise ImportError(found.stderr.strip().splitlines()[-1])
    return {name: version(name) for name in ("learned_optimization", "jax", "jaxlib")}


def measure(rule: str, pairs: int, rounds: int) -> dict[str, Any]:
    """``steps_per_cpu_second``, and ``first_outer_step``: seconds of a process until then, ``wall`` and ``cpu``."""
    command = [sys.executable, __file__, rule, f"--pairs={pairs}", f"--rounds={rounds}", f"--began={time.time()}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)
    return json.loads(done.stdout.splitlines()[-1])


def digits_mlp() -> Any:
    """The 64-32-10 MLP on digits as a task family of the library."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from learned_optimization.tasks import base
    from learned_optimization.tasks.datasets.base import Datasets
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), np.eye(10, dtype=np.float32)[labels]

    def batches(seed: int) -> Any:
        generator = np.random.default_rng(seed)
        while True:
            chosen = generator.integers(len(labels), size=BATCH)
            yield images[chosen], labels[chosen]

    class DigitsMLP(base.Task):
        datasets = Datasets(*map(batches, range(4)))

        def init(self, key: Any) -> Any:
            w0, w1 = jax.random.normal(key, (64, 32)) / 8, jax.random.normal(key, (32, 10)) / 32**0.5
            return {"w0": w0, "b0": jnp.zeros(32), "w1": w1, "b1": jnp.zeros(10)}

        def loss(self, params: Any, key: Any, data: Any) -> Any:
            logits = jax.nn.relu(data[0] @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
            return base.softmax_cross_entropy(logits=logits, labels=data[1]).mean()

    return base.single_task_to_family(DigitsMLP())


def meta_trainer(rule: str, pairs: int) -> Any:
    """The library's loop of one process; the two signs in turn, which was as fast as both in one batch."""
    from learned_optimization.optimizers import base as optimizers
    from learned_optimization.outer_trainers import gradient_learner, truncated_pes, truncation_schedule

    module, name, options = RULES[rule]
    learned = getattr(importlib.import_module(f"learned_optimization.learned_optimizers.{module}"), name)(**options)
    episodes = truncation_schedule.ConstantTruncationSchedule(EPISODE)
    inner = {"task_family": digits_mlp(), "learned_opt": learned, "trunc_sched": episodes}
    inner |= {"num_tasks": pairs, "random_initial_iteration_offset": EPISODE}
    step = "learned_optimization.outer_trainers.lopt_truncated_step"
    if importlib.util.find_spec(step):
        inner = {"truncated_step": importlib.import_module(step).VectorizedLOptTruncatedStep(**inner)}
    estimator = truncated_pes.TruncatedPES(**inner, trunc_length=WINDOW, steps_per_jit=WINDOW, std=0.01)
    return gradient_learner.SingleMachineGradientLearner(learned, [estimator], optimizers.Adam(3e-4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", choices=RULES)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--began", type=float, default=time.time(), help="time.time() as the process was started")
    given = parser.parse_args()
    os.environ |= ONE_THREAD
    import jax

    trainer = meta_trainer(given.rule, given.pairs)
    state, ends, first = trainer.init(jax.random.PRNGKey(1)), [], {}
    for key in jax.random.split(jax.random.PRNGKey(0), EPISODE // WINDOW + given.rounds):
        state, *_ = jax.block_until_ready(trainer.update(state, key)[:2])
        ends.append(time.process_time())
        first = first or {"wall": time.time() - given.began, "cpu": ends[0]}
    seconds = statistics.median([after - before for before, after in pairwise(ends)][-given.rounds :])
    print(json.dumps({"steps_per_cpu_second": 2 * given.pairs * WINDOW / seconds, "first_outer_step": first}))


if __name__ == "__main__":
    main()
