"""The choice of operations in a small network, which can be enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.resolve import resolve_rule
from metaopt.rule import Params
from metaopt.tune import Hypers, Inner
from metaopt.tune.outer import run
from metaopt_tasks.layers import hidden_weight, linear
from metaopt_tasks.problems.classification import Classification

OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda x, weight: torch.zeros_like(x),
    "skip": lambda x, weight: x,
    "linear": lambda x, weight: x @ weight.mT,
    "tanh": lambda x, weight: torch.tanh(x @ weight.mT),
}
"""Name -> function of x [n, width] and the edge's weight [width, width]."""

EDGES = ((0, 1), (0, 2), (1, 2))
"""From node to node; node 0 is the input, and node 2 feeds the classifier."""


@dataclass(frozen=True)
class ToyCell(Classification):
    """Differentiable architecture search (Liu et al. 2019, arXiv:1806.09055) in a cell of three edges and four operations.

    Each edge is the mean of `OPERATIONS`, weighed by the softmax of ``alphas`` [3, 4], the hypers; the operations of an edge
    share no weights. The 64 cells of one operation per edge can all be trained: ``report`` gives the ``rank`` among them (1 is
    the best) of the cell of the largest alphas, by holdout loss of a run of its own, its ``loss`` and the ``best_loss``.

    Attributes:
        width: of the nodes.
    """

    data: str = "spirals"
    examples: int = 300
    outer_lr: ClassVar[float] = 0.3
    inner_steps: int = 80
    width: int = 8

    def hypers(self, generator: Generator) -> Hypers:
        """All operations alike, but for a little noise."""
        return {"alphas": (1e-3 * torch.randn(len(EDGES), len(OPERATIONS), generator=generator)).to(self.device)}

    def inner(self, step: int) -> Inner:
        """Full-batch training of all operations' weights."""

        def loss(params: Params, hypers: Hypers, batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(self.mixed(params, batch["input"], hypers["alphas"].softmax(1)), batch["label"])

        rule = resolve_rule("momentum", lr=self.inner_lr)
        return Inner.of_rule(loss, rule, self._start(), self.inner_steps, full_batch=self.parts["inner"])

    def mixed(self, params: Params, inputs: Tensor, shares: Tensor) -> Tensor:
        """Logits [n, classes] of the cell whose edges mix their operations by ``shares`` [edges, operations]."""
        nodes = [linear(params, "stem", inputs)]
        for node in (1, 2):
            total = torch.zeros_like(nodes[0])
            for edge, (source, target) in enumerate(EDGES):
                if target == node:
                    for i, (name, operation) in enumerate(OPERATIONS.items()):
                        weight = params.get(f"{name}{edge}.weight", inputs)  # only two of the operations have one
                        total = total + shares[edge, i] * operation(nodes[source], weight)
            nodes.append(total)
        return linear(params, "head", nodes[2])

    def logits(self, params: Params, hypers: Hypers, inputs: Tensor) -> Tensor:
        """Of the mixed cell."""
        return self.mixed(params, inputs, hypers["alphas"].softmax(1))

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """See the class."""
        losses = self.losses_of_cells()
        chosen = tuple(hypers["alphas"].argmax(1).tolist())
        loss = losses[chosen]
        better = sum(other < loss for other in losses.values())
        return {"rank": 1.0 + better, "loss": loss, "best_loss": min(losses.values()), "cells": float(len(losses))}

    def losses_of_cells(self) -> dict[tuple[int, ...], float]:
        """Holdout loss of each cell of one operation per edge, trained by itself."""
        found = {}
        inner = self.inner(0)
        for cell in itertools.product(range(len(OPERATIONS)), repeat=len(EDGES)):
            alone = F.one_hot(torch.tensor(cell), len(OPERATIONS)).to(self.device).float().log()
            with torch.no_grad():
                params = inner.params(run(inner, {"alphas": alone}))
                found[cell] = float(self.cross_entropy(params, {"alphas": alone}, "holdout"))
        return found

    def _start(self) -> Params:
        generator, width = self.generator(2), self.width
        params = {"stem.weight": hidden_weight((width, self.features), generator), "stem.bias": torch.zeros(width)}
        for edge in range(len(EDGES)):
            for name in ("linear", "tanh"):
                params[f"{name}{edge}.weight"] = hidden_weight((width, width), generator)
        head = hidden_weight((self.classes, width), generator)
        params |= {"head.weight": head, "head.bias": torch.zeros(self.classes)}
        return {name: p.to(self.device) for name, p in params.items()}
