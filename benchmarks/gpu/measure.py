"""What the GPU benchmarks share: arguments, the clock, and the rows that they print, one JSON object a line."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

Row = dict[str, Any]
ROUNDS = 5


def print_rows(description: str, rows: Callable[[torch.device, bool], Iterator[Row]]) -> None:
    """The program: ``rows(device, small)``, each printed as soon as it is measured, so that a process cut short loses one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of no interest, which show that the program runs")
    given = parser.parse_args()
    for row in rows(torch.device(given.device), given.small):
        print(json.dumps(row), flush=True)


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """``row`` with what ``measure`` adds to it, or with the reason why there is none."""
    try:
        return row | measure()
    except Exception as error:  # one contender that fails leaves the others their turn
        return row | {"failed": f"{type(error).__name__}: {error}"[:2000]}


def seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median time of one call, of `ROUNDS` rounds of so many calls that all take about ``budget`` seconds.

    Calls within a round queue on the device as they do in a training loop; what the host does meanwhile costs nothing.
    """

    def round_of(calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    round_of(2)  # compiles, fills caches
    calls = max(1, round(budget / ROUNDS / round_of(2)))
    return statistics.median(round_of(calls) for _ in range(ROUNDS))


def launches(call: Callable[[], object]) -> dict[str, int]:
    """How often one call launches each Triton kernel: none where torch operations did the work, or the interpreter."""
    try:
        from triton import knobs
    except ImportError:
        return {}
    found: Counter[str] = Counter()

    def count(launch: Any) -> None:
        found[launch.get()["name"]] += 1

    knobs.runtime.launch_enter_hook.add(count)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(count)
    return dict(found)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, small: bool) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches: the ceiling of everything elementwise."""
    source = torch.randn(2**16 if small else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 0.01 if small else 1.0)


def product_rate(device: torch.device, small: bool, precision: str) -> float:
    """FLOP/s of a large float32 matrix product, in "highest" precision or "high" (TF32)."""
    size = 64 if small else 8192
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return 2 * size**3 / seconds(lambda: a @ b, device, 0.01 if small else 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
