"""Which examples deserve to be learnt from: those with right labels, or the few that teach most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.resolve import resolve_rule
from metaopt.rule import Params
from metaopt.task import Batch
from metaopt.tune import Hypers, Inner
from metaopt.tune.outer import run
from metaopt_tasks.layers import mlp
from metaopt_tasks.problems.classification import Classification


@dataclass(frozen=True)
class Weighted(Classification):
    """A weight for every inner example of a softmax regression, many of which have wrong labels.

    Hypers: ``example_logits`` [n]; example i has the weight sigmoid(logit_i) in the mean of the inner loss.

    Attributes:
        corrupted: share of inner examples with wrong labels.
    """

    corrupted: float = 0.5

    @cached_property
    def noisy(self) -> Batch:
        """The inner part as the run sees it, and ``wrong`` [n]: whose labels are."""
        label, wrong = self.with_wrong_labels(self.parts["inner"]["label"], self.corrupted)
        return {"input": self.parts["inner"]["input"], "label": label, "wrong": wrong}

    def hypers(self, generator: Generator) -> Hypers:
        """All weights 1 / 2."""
        return {"example_logits": torch.zeros(self.examples, device=self.device)}

    def inner(self, step: int) -> Inner:
        """Full-batch gradient descent from zero."""
        return self.training(self.noisy)

    def training(self, data: Batch) -> Inner:
        """Gradient descent on ``data``, of which example i has the weight sigmoid(hypers["example_logits"][i])."""

        def loss(params: Params, hypers: Hypers, batch: Batch) -> Tensor:
            losses = F.cross_entropy(self.logits(params, hypers, batch["input"]), batch["label"], reduction="none")
            return (hypers["example_logits"].sigmoid() * losses).mean()

        rule = resolve_rule("sgd", lr=self.inner_lr)
        return Inner.of_rule(loss, rule, self.network(()), self.inner_steps, full_batch=data)

    def logits(self, params: Params, hypers: Hypers, inputs: Tensor) -> Tensor:
        """Of a softmax regression."""
        return mlp(params, inputs, torch.relu)

    def fitted(self, data: Batch) -> Params:
        """A fresh run on ``data``, all of one weight: that of a certain example."""
        certain = {"example_logits": torch.full((len(data["label"]),), torch.inf, device=self.device)}
        inner = self.training(data)
        return inner.params(run(inner, certain))


@dataclass(frozen=True)
class HyperCleaning(Weighted):
    """Find the examples with wrong labels (Franceschi et al. 2017, arXiv:1703.01785).

    An example is taken for wrong where its weight is below 1 / 2, where it began. ``report``: ``f1``, ``precision`` and
    ``recall`` of that; ``test_accuracy`` of a fresh run on the others and the clean examples of the outer levels; and, under
    ``noisy``, ``clean_only`` and ``oracle``, of one on all examples, on the clean ones of the outer levels, and on all but the
    wrong ones.
    """

    outer_steps: ClassVar[int] = 60
    examples: int = 600
    outer_examples: int = 100
    holdout_examples: int = 100

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """See the class."""
        wrong = self.noisy["wrong"]
        found = hypers["example_logits"] < 0
        hits = float((found & wrong).sum())
        precision, recall = hits / max(float(found.sum()), 1.0), hits / max(float(wrong.sum()), 1.0)
        every = torch.ones_like(wrong)
        kept = {"test_accuracy": ~found, "noisy": every, "clean_only": ~every, "oracle": ~wrong}
        return {
            "f1": 2 * precision * recall / max(precision + recall, 1e-12),
            "precision": precision,
            "recall": recall,
            **{name: self.accuracy(self.fitted(self._with_clean(rows, name)), {}) for name, rows in kept.items()},
        }

    def _with_clean(self, rows: Tensor, name: str) -> Batch:
        """Those rows of the noisy part, and the clean parts of the outer levels, except for the control on noise alone."""
        clean = [] if name == "noisy" else [self.parts["outer"], self.parts["holdout"]]
        chosen = {key: self.noisy[key][rows] for key in ("input", "label")}
        return {key: torch.cat([value, *(part[key] for part in clean)]) for key, value in chosen.items()}


@dataclass(frozen=True)
class SampleSelection(Weighted):
    """Find the few examples that are best to train on.

    The outer objective has the penalty ``strength (mean weight - share)^2``, so weights become scarce. ``report``:
    ``test_accuracy`` of a fresh run on the ``share`` of examples with the largest weights; ``random``, on as many random ones;
    and ``all``, on all of them.

    Attributes:
        share: of the examples that shall be chosen.
        strength: of the penalty.
    """

    outer_steps: ClassVar[int] = 100
    examples: int = 600
    corrupted: float = 0.3
    share: float = 0.2
    strength: float = 10.0

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """Cross-entropy and penalty."""
        taken = hypers["example_logits"].sigmoid().mean()
        return super().outer(params, hypers, step) + self.strength * (taken - self.share) ** 2

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """See the class."""
        count = round(self.share * self.examples)
        best = hypers["example_logits"].argsort(descending=True)
        random = torch.randperm(self.examples, generator=self.generator(3)).to(best)
        chosen = {"test_accuracy": best[:count], "random": random[:count], "all": best}
        rows = {name: {key: self.noisy[key][at] for key in ("input", "label")} for name, at in chosen.items()}
        wrong = float(self.noisy["wrong"][best[:count]].double().mean())
        return {name: self.accuracy(self.fitted(data), {}) for name, data in rows.items()} | {"wrong_share": wrong}
