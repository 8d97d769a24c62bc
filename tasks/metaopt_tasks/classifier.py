"""What the classifiers of images, series and point clouds share: the loss of their logits."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from metaopt.rule import Params
from metaopt.task import Batch
from metaopt_tasks.layers import cross_entropy
from metaopt_tasks.scales import CrossEntropyTask


@dataclass(eq=False)
class Classifier(CrossEntropyTask):
    """A model of ``label`` [B] given ``input`` [B, ...]."""

    @abstractmethod
    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] -> logits [B, classes]."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of ``input`` [B, ...] and ``label`` [B]."""
        return cross_entropy(self.logits(params, batch["input"]), batch["label"])
