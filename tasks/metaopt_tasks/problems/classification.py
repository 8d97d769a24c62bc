"""What problems about the training of a classifier share: four parts of labelled data, and how a run is judged."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.rule import Params
from metaopt.task import Batch
from metaopt.tune import Hypers
from metaopt.tune.problem import BilevelProblem
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import mlp_params


@dataclass(frozen=True)
class Classification(BilevelProblem):
    """Cross-entropy on examples that the inner run does not see.

    Attributes:
        data: a registered source with ``input`` and ``label``; its parts are pooled and cut anew.
        examples, outer_examples, holdout_examples: of the three levels; the rest are for tests.
        inner_steps, inner_lr: of the inner run.
        seed: of the cut, and of all else that is random in the data.
        device: where to compute.
    """

    data: str = "digits"
    examples: int = 200
    outer_examples: int = 300
    holdout_examples: int = 300
    inner_steps: int = 100
    inner_lr: float = 0.1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("examples", "outer_examples", "holdout_examples", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @cached_property
    def parts(self) -> dict[str, Batch]:
        """``inner``, ``outer``, ``holdout`` and ``test``, each ``{"input": [n, features], "label": [n]}``."""
        splits = load(self.data, self.device)
        pooled = {name: torch.cat([split.tensors[name] for split in splits.values()]) for name in ("input", "label")}
        pooled["input"] = pooled["input"].flatten(1)
        sizes = {"inner": self.examples, "outer": self.outer_examples, "holdout": self.holdout_examples}
        if sum(sizes.values()) >= len(pooled["label"]):
            raise ValueError(
                f"{self.data!r} has {len(pooled['label'])} examples, but {sizes} leave none for tests; take fewer"
            )
        sizes["test"] = len(pooled["label"]) - sum(sizes.values())
        rows = torch.randperm(len(pooled["label"]), generator=self.generator(0)).to(self.device)
        pieces = rows.split(list(sizes.values()))
        return {
            part: {name: tensor[piece] for name, tensor in pooled.items()}
            for part, piece in zip(sizes, pieces, strict=True)
        }

    @cached_property
    def classes(self) -> int:
        """Number of classes."""
        return classes_of(load(self.data, self.device))

    @property
    def features(self) -> int:
        """Numbers of one input."""
        return self.parts["inner"]["input"].shape[1]

    @abstractmethod
    def logits(self, params: Params, hypers: Hypers, inputs: Tensor) -> Tensor:
        """[n, classes] of inputs [n, features]; most models know nothing of the hypers."""

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """Cross-entropy on the outer part."""
        return self.cross_entropy(params, hypers, "outer")

    def holdout(self, params: Params, hypers: Hypers) -> Tensor | None:
        """Cross-entropy on the holdout part."""
        return self.cross_entropy(params, hypers, "holdout")

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """Accuracy on the test part."""
        return {"test_accuracy": self.accuracy(params, hypers)}

    def cross_entropy(self, params: Params, hypers: Hypers, part: str) -> Tensor:
        """Mean over one of the parts."""
        data = self.parts[part]
        return F.cross_entropy(self.logits(params, hypers, data["input"]), data["label"])

    def accuracy(self, params: Params, hypers: Hypers, part: str = "test") -> float:
        """Share of a part's examples that are classified rightly."""
        with torch.no_grad():
            answer = self.logits(params, hypers, self.parts[part]["input"]).argmax(1)
        return float((answer == self.parts[part]["label"]).double().mean())

    def generator(self, stream: int) -> Generator:
        """Random numbers of one kind, determined by the seed."""
        return Generator().manual_seed(1_000 * self.seed + stream)

    def with_wrong_labels(self, label: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Labels [n] of which a share is replaced by other ones, and where [n]."""
        if not 0 <= share < 1:
            raise ValueError(f"corrupted must be in [0, 1), got {share}: a share of the inner examples")
        generator = self.generator(1)
        wrong = torch.randperm(len(label), generator=generator).to(self.device) < round(share * len(label))
        shift = torch.randint(1, self.classes, (len(label),), generator=generator).to(self.device)
        return torch.where(wrong, (label + shift) % self.classes, label), wrong

    def network(self, hidden: tuple[int, ...]) -> Params:
        """Initial parameters of a perceptron of these hidden widths for the data; zero weights without hidden layers."""
        sizes = (self.features, *hidden, self.classes)
        params = mlp_params(sizes, self.generator(2), 2**0.5)
        if not hidden:
            params = {name: torch.zeros_like(p) for name, p in params.items()}
        return {name: p.to(self.device) for name, p in params.items()}
