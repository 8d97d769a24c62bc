"""Measure every named task and write the suite's lock file: ``python -m metaopt_tasks.measure [NAME ...]``.

Per task: the ``data`` sources that it loads; ``parameters``; ``bytes`` of one copy's parameters and buffers; ``data_bytes``
shared by all copies; ``ms_per_step``, of one copy with AdamW on one core; ``content`` (`metaopt.suite.content_hash`); and a
``fingerprint``: the training losses of the first steps of AdamW from seed 0, which tests compare. Per suite: its hash.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor

from metaopt import registry
from metaopt.files import write_atomic
from metaopt.suite import content_hash, suite_hash, suites
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_tasks.suites import LOCK, lock

FINGERPRINT_LR = 1e-3
SECONDS = 0.2
"""Time that is given to timing one task."""


def measured(name: str) -> dict[str, Any]:
    """What the lock file says of the task ``name``."""
    with mock.patch.object(registry, "create", wraps=registry.create) as create:
        task = registry.create("task", name)
    sources = {call.args[1] for call in create.call_args_list if call.args[0] == "data_source"}
    params = task.init(torch.Generator().manual_seed(0))
    data = [tensor for split in (task.train, task.valid, task.test) for tensor in split.tensors.values()]
    return {
        "data": ", ".join(sorted(sources)),
        "parameters": sum(p.numel() for p in params.values()),
        "bytes": _bytes([*params.values(), *task.buffers().values()]),
        "data_bytes": _bytes({tensor.data_ptr(): tensor for tensor in [*data, *task.config.values()]}.values()),
        "ms_per_step": _milliseconds(task),
        "content": content_hash(task),
        "fingerprint": [float(f"{loss:.6g}") for loss in fingerprint(task)],
    }


@torch.no_grad()
def fingerprint(task: Task, steps: int = 2) -> list[float]:
    """Training losses of the first steps of AdamW at 1e-3 from seed 0."""
    rule = registry.create("optimizer", "adamw", lr=FINGERPRINT_LR)
    losses, _ = unroll(task, rule, start(task, rule, [0]), steps, backend="loop")
    return losses[0].tolist()


@torch.no_grad()
def _milliseconds(task: Task) -> float:
    rule = registry.create("optimizer", "adamw", lr=FINGERPRINT_LR)
    carry = start(task, rule, [0])
    unroll(task, rule, carry, 1, backend="loop")  # builds the rule's C++ step, fills caches
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        began = time.perf_counter()
        unroll(task, rule, carry, 1, backend="loop")
        times.append(time.perf_counter() - began)
    return float(f"{1e3 * min(times):.3g}")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def main(names: Sequence[str] = ()) -> None:
    """Measure the tasks ``names`` (all if there are none) and write the lock file."""
    torch.set_num_threads(1)
    facts = dict(lock()["tasks"])
    everything = [name for suite in suites().values() for name in suite]
    for name in track(list(names) or everything, description="measuring"):
        facts[name] = measured(name)
    hashes = {}
    for suite, members in suites().items():
        hashes[suite] = suite_hash({name: facts[name]["content"] for name in members if name in facts})
    kept = {name: facts[name] for name in sorted(facts) if name in everything}
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kept.items()]
    text = ",\n".join(rows)
    write_atomic(LOCK, f'{{"suites": {json.dumps(hashes)},\n "tasks": {{\n{text}\n}}}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
