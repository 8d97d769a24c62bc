"""Inner steps per second of many runs at once: MLP 64-32-10 on digits, batch 64, by every back-end that is installed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Row, attempt, launches, print_rows, seconds

from metaopt import registry
from metaopt.rule import UpdateRule
from metaopt.task import Task
from metaopt.unroll import start, unroll

COPIES = (1024, 2048)
STEPS = 50
BACKENDS = ("fused", "graph", "eager", "compile")
"""Quick ones first: compiling may use up the time."""
LEARNED = {"small_fc_lopt, hidden 4": 4, "celo2_base": None, "small_fc_lopt, hidden 32": 32}
FLOP_PER_STEP = 64 * (4 * (64 * 32 + 32 * 10) + 2 * 32 * 10)
"""Of loss and gradient: two products per layer and the inputs' gradient of the second, 2 FLOP for each multiplication."""


def rules(device: torch.device) -> dict[str, UpdateRule]:
    """AdamW, and learned optimizers at random theta."""
    found: dict[str, UpdateRule] = {"adamw": registry.create("optimizer", "adamw")}
    for label, hidden in LEARNED.items():
        options = {} if hidden is None else {"hidden": hidden}
        learned = registry.create("learned_optimizer", label.partition(",")[0], **options)
        found[label] = learned.bind(learned.init_theta(torch.Generator().manual_seed(0))).to(device)
    return found


@torch.no_grad()
def speed(task: Task, rule: UpdateRule, copies: int, steps: int, backend: str, budget: float) -> Row:
    """Of ``steps`` inner steps of all copies in one call."""
    if backend not in registry.specs("unroll_backend"):
        return {"skipped": f"no back-end {backend!r} is installed"}
    carry = start(task, rule, list(range(copies)))

    def window() -> object:
        return unroll(task, rule, carry, steps, backend=backend)

    rate = copies * steps / seconds(window, task.device, budget)
    return {"steps_per_second": rate, "flop_per_second": rate * FLOP_PER_STEP, "launches": launches(window)}


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    task = registry.create("task", "digits_mlp", device=str(device))
    for backend in ("fused", "eager") if small else BACKENDS:
        for label, rule in list(rules(device).items())[: 2 if small else None]:
            for copies in (2,) if small else COPIES[:1] if backend == "compile" else COPIES:
                yield attempt(
                    {"rule": label, "backend": backend, "copies": copies},
                    lambda rule=rule, backend=backend, copies=copies: speed(
                        task, rule, copies, 2 if small else STEPS, backend, 0.01 if small else 1.0
                    ),
                )


if __name__ == "__main__":
    print_rows(__doc__, rows)
