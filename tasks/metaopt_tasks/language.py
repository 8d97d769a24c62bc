"""What sequence models share: the loss of predicting each next token."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaopt.rule import Params
from metaopt.task import Batch, Split
from metaopt_tasks.data.load import load
from metaopt_tasks.data.text import TextWindows
from metaopt_tasks.layers import cross_entropy
from metaopt_tasks.scales import CrossEntropyTask


@dataclass(eq=False)
class LanguageModel(CrossEntropyTask):
    """A model of ``tokens`` [B, context + 1] int64, each predicted from those before it.

    Attributes:
        context: tokens that predict, at most, the next one.
    """

    context: int = 32

    @abstractmethod
    def logits(self, params: Params, tokens: Tensor) -> Tensor:
        """Tokens [B, T] int64, T at most ``context`` -> logits [B, T, classes] of the tokens that follow each."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of the targets, in nats: of all, or of those that ``mask`` [B, T] marks in each sequence."""
        tokens = batch["tokens"]
        logits, targets = self.logits(params, tokens[:, :-1]), tokens[:, 1:]
        if "mask" not in batch:
            return cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        mask = batch["mask"].to(losses.dtype)
        return ((losses * mask).sum(1) / mask.sum(1)).mean()


def load_tokens(source: str, context: int | None = None, device: Any = "cpu") -> tuple[dict[str, Split], int, int]:
    """The registered data source of tokens, its number of different tokens, and its context.

    Args:
        source: name of a source whose splits hold ``tokens`` [N, T + 1], or of a text.
        context: handed to the source, if given; default the source's own.
        device: where the tokens live.
    """
    data = load(source, device, **({} if context is None else {"context": context}))
    train = data["train"]
    length = train.take(torch.zeros(1, dtype=torch.int64, device=device))["tokens"].shape[-1] - 1
    if isinstance(train, TextWindows):
        return data, train.vocabulary_size, length
    return data, 1 + max(int(split.tensors["tokens"].max()) for split in data.values()), length
