"""What this device can do at best: bytes per second of a copy, FLOP/s of matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Row, attempt, copy_bandwidth, print_rows, product_rate


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    yield attempt({"ceiling": "copy"}, lambda: {"bytes_per_second": copy_bandwidth(device, small)})
    for name, precision in (("float32 product", "highest"), ("tf32 product", "high")):
        yield attempt(
            {"ceiling": name}, lambda precision=precision: {"flop_per_second": product_rate(device, small, precision)}
        )


if __name__ == "__main__":
    print_rows(__doc__, rows)
