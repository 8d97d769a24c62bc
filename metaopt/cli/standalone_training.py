"""A training script that knows nothing of metaopt: it uses an exported optimizer as any user would.

Run as ``python -I -S standalone_training.py EXPORTED.py SITE_PACKAGES STEPS``: isolated and without site, so that only the
directory that holds torch is on the path.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


class _NoMetaopt:
    """Refuses to find metaopt, in case it is installed beside torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0].startswith("metaopt"):
            raise ModuleNotFoundError(f"{name} is hidden from this interpreter")


def main(exported: str, site_packages: str, steps: int) -> None:
    """Train a 64-64-10 MLP on scikit-learn's digits and print its test accuracy."""
    sys.path.append(site_packages)
    sys.meta_path.insert(0, _NoMetaopt())

    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    spec = importlib.util.spec_from_file_location("exported", exported)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported"] = module
    spec.loader.exec_module(module)
    exported_class: Any = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value.__module__ == "exported"
    )

    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16 - 0.3
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = exported_class(model.parameters())

    def accuracy() -> float:
        with torch.no_grad():
            return (model(images[test]).argmax(1) == labels[test]).float().mean().item()

    before = accuracy()
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    leaked = sorted(name for name in sys.modules if name.startswith("metaopt"))
    print(
        f"{type(optimizer).__name__} from {exported}: test accuracy {before:.1%} -> {accuracy():.1%} in {steps} steps; "
        f"metaopt modules loaded: {len(leaked)}"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
