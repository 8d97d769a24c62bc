"""What `test_kill_and_resume` starts: meta-training that kills one of its processes once, and is started again.

Run as ``torchrun --max-restarts 2 ... kill_worker.py DIRECTORY VICTIM STEP STEP``: the process of rank VICTIM kills itself in
the first run in the midst of the first step given, after a restart in the second run in that of the other; then come
unbroken runs.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from metaopt.meta import trainer
from metaopt.meta.distributed import process_group
from metaopt.meta.trainer import MetaTrainConfig, meta_train

STEPS = 30
ESTIMATORS = {"pes": {"pairs": 3, "window": 5}, "truncated_unroll": {"copies": 3, "window": 5, "segment": 5}}


def config(estimator: str) -> MetaTrainConfig:
    """A few seconds of meta-training with everything on that a checkpoint has to hold."""
    return MetaTrainConfig(
        tasks=[{"name": "quadratic", "options": {"dim": 4}}], learned_options={"hidden": 4, "step_scale": 0.01}, horizon=13,
        estimator=estimator, estimator_options=ESTIMATORS[estimator], outer_steps=STEPS, outer_lr=0.01, warmup=3,
        checkpoint_every=4, ema_decay=0.9, evaluate_every=15, evaluate_on=["quadratic"],
    )  # fmt: skip


def kill_in(step: int) -> None:
    """This process dies between the meta-gradient of that step (counted from 0) and the move of theta by it."""
    update = trainer._Run._update

    def die_or_update(run: trainer._Run, *arguments: Any) -> float:
        if run.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, *arguments)

    trainer._Run._update = die_or_update  # type: ignore[method-assign]


def main(directory: Path, victim: int, steps: list[int]) -> None:
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with process_group() as shard:
        for i, estimator in enumerate(ESTIMATORS):
            if restarts == i and shard.rank == victim:
                kill_in(steps[i])
            meta_train(config(estimator), directory / f"{estimator}_killed", progress=False, shard=shard)
        for estimator in ESTIMATORS:
            meta_train(config(estimator), directory / f"{estimator}_unbroken", progress=False, shard=shard)
    left = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in left), f"threads that may abort the exit: {left}"
    if shard.rank == 0:
        (directory / "restarts").write_text(str(restarts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(step) for step in sys.argv[3:]])
