"""``optimizer.step()`` on the parameters of GPT-2 small (124M in 148 tensors), beside torch's fused AdamW and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from measure import Row, attempt, copy_bandwidth, launches, print_rows, seconds
from step import Named, gpt
from torch import nn

import metaopt
from metaopt import EightBitState, registry
from metaopt.execution import Execution

LEARNED = {"small_fc_lopt": {"hidden": 32}, "celo2": {}, "velo": {}}
SLOTS = {"torch fused AdamW": 2, "adamw": 2, "lion": 1}
"""Numbers per parameter that a step reads and writes besides the parameter itself; a gradient is only read."""

Make = Callable[[Named], torch.optim.Optimizer]


def contenders(device: torch.device) -> dict[str, Make]:
    """Every optimizer by its name; the first is the yardstick."""
    execution: Execution = "fused" if device.type == "cuda" else "auto"  # "auto" builds nothing for small tensors
    made: dict[str, Make] = {
        "torch fused AdamW": lambda named: torch.optim.AdamW(named, fused=True),
        "adamw": lambda named: metaopt.optimizer("adamw", named, execution=execution),
        "adamw, 8-bit state": lambda named: metaopt.optimizer(
            EightBitState(registry.create("optimizer", "adamw")), named, execution=execution
        ),
        "lion": lambda named: metaopt.optimizer("lion", named, execution=execution),
    }
    for name, options in LEARNED.items():
        learned = registry.create("learned_optimizer", name, **options)
        rule = learned.bind(learned.init_theta(torch.Generator().manual_seed(0))).to(device)
        label = name + "".join(f", {option} {value}" for option, value in options.items())
        made[label] = lambda named, rule=rule: metaopt.optimizer(rule, named, horizon=1000, execution=execution)
    return made


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    shapes = gpt(64, 1, 65, 32) if small else gpt(768, 12, 50257, 1024)
    copy = copy_bandwidth(device, small)
    fused = float("nan")
    for name, make in contenders(device).items():

        def measure(name: str = name, make: Make = make) -> Row:
            nonlocal fused
            named = [(key, nn.Parameter(0.02 * torch.randn(shape, device=device))) for key, shape in shapes.items()]
            for _, p in named:
                p.grad = torch.randn_like(p)
            optimizer = make(named)
            loss = torch.ones((), device=device)

            def step() -> object:
                return optimizer.step(lambda: loss)

            found: Row = {
                "parameters": sum(p.numel() for _, p in named), "tensors": len(named),
                "seconds": seconds(step, device, 0.01 if small else 2.0), "launches": launches(step),
            }  # fmt: skip
            fused = found["seconds"] if name == "torch fused AdamW" else fused
            found["over_torch_fused"] = found["seconds"] / fused
            if name in SLOTS:
                rate = 4 * (3 + 2 * SLOTS[name]) * found["parameters"] / found["seconds"]
                found |= {"bytes_per_second": rate, "of_copy": rate / copy}
            return found

        yield attempt({"optimizer": name}, measure)


if __name__ == "__main__":
    print_rows(__doc__, rows)
