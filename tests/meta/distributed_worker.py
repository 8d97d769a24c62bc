"""What `test_distributed` starts in several processes: checks of each process, and results that rank 0 writes.

Run as ``torchrun ... distributed_worker.py DIRECTORY``; the last rank kills itself at the end, and the others notice.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from toys import Diverging, Quadratic, as_theta

from metaopt import registry, tree
from metaopt.meta import trainer
from metaopt.meta.checkpoint import load_checkpoint, save_checkpoint
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.distributed import process_group
from metaopt.meta.shard import ALONE, Shard

COPIES = 7
PAIRS, RUNS = {"pairs": COPIES, "window": 7}, {"copies": COPIES, "window": 7}
STRATEGIES = [("es", PAIRS), ("pes", PAIRS), ("nres", PAIRS), ("full_es", {"pairs": COPIES})]
ESTIMATORS: list[tuple[str, dict[str, Any]]] = [
    *STRATEGIES, ("pes_analytic", PAIRS), ("truncated_unroll", RUNS), ("forward_gradient", RUNS),
    ("full_unroll", {"copies": COPIES}),
    *((name, options | {"seed_replay": True}) for name, options in STRATEGIES),
    ("pes", PAIRS | {"shaping": "rank", "clip_task": 0.1}), ("es", PAIRS | {"antithetic": False}),
]  # fmt: skip


class Toy(Diverging, Quadratic):
    """Quadratic, in float64; 1 episode of 20 diverges."""


def example(copies: torch.Tensor) -> dict[str, Any]:
    """Leaves of every kind that carries have, one row per copy."""
    return {
        "clock": 10 * copies,
        "run": {
            "params": torch.stack([copies + 0.5] * 3, 1).float().T.contiguous().T,
            "alive": copies % 2 == 0,
            "empty": torch.zeros(len(copies), 0),
            "half": copies.to(torch.bfloat16)[:, None, None],
        },
    }


def equal(one: tree.Tree, other: tree.Tree) -> bool:
    """Same structure, dtypes, shapes and bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return one.dtype == other.dtype and torch.equal(one, other)


def same_everywhere(shard: Shard, value: Any) -> bool:
    """Whether this process has the bits of rank 0."""
    return equal(value, shard.broadcast(value))


def check_messages(shard: Shard) -> None:
    """Sum, gather and broadcast, with uneven and with empty shares."""
    for n in (COPIES, 1, 0):
        assert equal(shard.gather(example(shard.own(n)), n), example(torch.arange(n)))
    numbers = torch.randn(1000, 2, generator=torch.Generator().manual_seed(shard.rank), dtype=torch.float64).T
    total = shard.sum(numbers)
    assert same_everywhere(shard, {"total": total})
    each = [
        torch.randn(1000, 2, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
        for r in range(shard.world)
    ]
    torch.testing.assert_close(total, sum(each).T, rtol=1e-15, atol=1e-15)  # type: ignore[union-attr]
    assert shard.broadcast({"rank": shard.rank}) == {"rank": 0}


def check_checkpoints(shard: Shard, directory: Path) -> None:
    """One that a single process wrote, and one for a single process to read."""
    content = load_checkpoint(directory / "alone.pt", shard)
    assert content is not None
    assert equal(content["carries"]["task"]["copies"], example(shard.own(COPIES)))
    assert load_checkpoint(directory / "none.pt", shard) is None
    save_checkpoint(directory / f"world{shard.world}.pt", content, shard)


def estimates(shard: Shard = ALONE) -> dict[str, Any]:
    """Twelve outer steps with each estimator: meta-gradients, metrics, and the carry at the end."""
    results = {}
    for name, options in ESTIMATORS:
        estimator, inner, theta = registry.create("estimator", name, **options), Toy(), as_theta([0.05, -0.03])
        carry = estimator.start(inner, theta, 4, shard)
        gradients, metrics = [], []
        for _ in range(12):
            gradient, carry, measured = estimator.estimate(inner, theta, carry, shard)
            assert same_everywhere(shard, gradient)
            theta = {"theta": theta["theta"] - 0.01 * gradient["theta"]}
            gradients.append(gradient["theta"])
            metrics.append(torch.tensor([measured[key] for key in sorted(measured)], dtype=torch.float64))
        results[f"{name} {options}"] = {
            "gradients": torch.stack(gradients), "metrics": torch.stack(metrics), "carry": carry,
        }  # fmt: skip
    return results


def check_theta(shard: Shard, directory: Path) -> None:
    """Processes that would begin with different thetas and tasks have those of rank 0, and one that goes astray stops all."""
    config = MetaTrainConfig(
        tasks=["quadratic", "iris_mlp", "digits_mlp"], tasks_per_step=1, learned_options={"hidden": 4}, seed=shard.rank
    )
    run = trainer._Run(config, shard, None)
    assert same_everywhere(shard, run.theta)
    chosen = []
    for run.step in range(8):
        chosen += run._choose()
    assert chosen == shard.broadcast(chosen)
    run.require_same_theta()
    if shard.rank == shard.world - 1:
        run.trained["b0"][0] += 1e-7
    try:
        run.require_same_theta()
    except RuntimeError as error:
        (directory / f"astray{shard.rank}").write_text(str(error))


def lose_the_last(shard: Shard, directory: Path) -> None:
    """The last process dies; each other one must get an error from its next message, and not wait."""
    if shard.rank == shard.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end this process before it can say so
    began = time.monotonic()
    try:
        shard.sum(torch.zeros(1))
    except RuntimeError:
        (directory / f"noticed{shard.rank}").write_text(str(time.monotonic() - began))


def main(directory: Path) -> None:
    with process_group() as shard:
        check_messages(shard)
        check_checkpoints(shard, directory)
        check_theta(shard, directory)
        save_checkpoint(directory / "estimates.pt", estimates(shard), shard)
        lose_the_last(shard, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
