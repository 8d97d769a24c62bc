"""Linear regression on made-up data."""

import torch
from torch import Generator, Tensor

from metaopt import Split, Task


class LeastSquares(Task):
    """Find the vector that generated the targets."""

    def init(self, generator: Generator) -> dict[str, Tensor]:
        """Start at random."""
        return {"weight": torch.randn(self.train.tensors["input"].shape[1], generator=generator)}

    def loss(self, params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error."""
        return torch.mean((batch["input"] @ params["weight"] - batch["target"]) ** 2)


def least_squares(device: str = "cpu", size: int = 8, examples: int = 256) -> LeastSquares:
    """The task with its data on ``device``."""
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(3 * examples, size, generator=generator), torch.randn(size, generator=generator)
    train, valid, test = (Split({"input": x, "target": x @ truth}).to(device) for x in inputs.split(examples))
    return LeastSquares("least_squares", train, valid, test, batch_size=32)
