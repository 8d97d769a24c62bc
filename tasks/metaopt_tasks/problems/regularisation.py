"""How much to hold a run back: weight decays, class weights and label smoothing, augmentation, ridge penalties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.random import normal
from metaopt.resolve import resolve_rule
from metaopt.rule import Params
from metaopt.task import Batch
from metaopt.tune import Hypers, Inner
from metaopt.tune.problem import BilevelProblem
from metaopt_tasks.choices import require_choice
from metaopt_tasks.layers import mlp
from metaopt_tasks.problems.classification import Classification

GROUPINGS = ("parameter", "layer", "all")


@dataclass(frozen=True)
class Perceptron(Classification):
    """A perceptron with one hidden layer as the inner model.

    Attributes:
        hidden: its width.
        rule: what trains it.
    """

    hidden: int = 32
    rule: str = "momentum"

    def logits(self, params: Params, hypers: Hypers, inputs: Tensor) -> Tensor:
        """Of a perceptron with tanh, whose derivatives are smooth."""
        return mlp(params, inputs, torch.tanh)

    def training(self, loss: Callable[[Params, Hypers, Batch], Tensor], **data: Any) -> Inner:
        """A run on this loss from the network's initial parameters; ``data`` as in `Inner.of_rule`."""
        rule = resolve_rule(self.rule, lr=self.inner_lr)
        return Inner.of_rule(loss, rule, self.network((self.hidden,)), self.inner_steps, **data)


@dataclass(frozen=True)
class WeightDecay(Perceptron):
    """An L2 penalty for each weight, each tensor or all of them (Lorraine et al. 2020, arXiv:1911.02590).

    Hypers: logarithms of the penalties, one named like each parameter, or ``all``. The inner loss is the cross-entropy plus
    sum(penalty weight^2) / 2.

    Attributes:
        per: "parameter", "layer" (each tensor has one) or "all".
        initial: penalty of every weight.
        corrupted: share of inner examples with wrong labels.
    """

    per: str = "layer"
    initial: float = 1e-3
    corrupted: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("per", self.per, GROUPINGS)

    def hypers(self, generator: Generator) -> Hypers:
        """The logarithm of ``initial`` everywhere."""
        start = self.network((self.hidden,))
        shapes = {name: p.shape if self.per == "parameter" else () for name, p in start.items()}
        shapes = {"all": ()} if self.per == "all" else shapes
        return {name: torch.full(shape, math.log(self.initial), device=self.device) for name, shape in shapes.items()}

    def inner(self, step: int) -> Inner:
        """Full-batch training."""

        def loss(params: Params, hypers: Hypers, batch: Batch) -> Tensor:
            fit = F.cross_entropy(self.logits(params, hypers, batch["input"]), batch["label"])
            logs = {name: hypers["all" if self.per == "all" else name] for name in params}
            return fit + sum((logs[name].exp() * p**2).sum() for name, p in params.items()) / 2

        return self.training(loss, full_batch=self._noisy)

    @cached_property
    def _noisy(self) -> Batch:
        inner = self.parts["inner"]
        return {"input": inner["input"], "label": self.with_wrong_labels(inner["label"], self.corrupted)[0]}


@dataclass(frozen=True)
class LossWeighting(Perceptron):
    """Class weights and label smoothing for imbalanced classes and wrong labels.

    Class c has ``decay^c`` times the examples of class 0. Hypers: ``class_log_weights`` [classes], whose softmax times the
    number of classes weighs the examples; ``smoothing_logit`` (), whose sigmoid is the mass that goes to all classes alike.

    Attributes:
        decay: in (0, 1].
        corrupted: share of inner examples with wrong labels.
    """

    examples: int = 700
    outer_examples: int = 200
    holdout_examples: int = 200
    decay: float = 0.7
    corrupted: float = 0.1

    def hypers(self, generator: Generator) -> Hypers:
        """Equal weights, smoothing 0.05."""
        return {
            "class_log_weights": torch.zeros(self.classes, device=self.device),
            "smoothing_logit": torch.tensor(math.log(0.05 / 0.95), device=self.device),
        }

    def inner(self, step: int) -> Inner:
        """Full-batch training on the imbalanced part."""

        def loss(params: Params, hypers: Hypers, batch: Batch) -> Tensor:
            logs = self.logits(params, hypers, batch["input"]).log_softmax(1)
            smoothing = hypers["smoothing_logit"].sigmoid()
            target = (1 - smoothing) * F.one_hot(batch["label"], self.classes) + smoothing / self.classes
            weights = (self.classes * hypers["class_log_weights"].softmax(0))[batch["label"]]
            return -(weights * (target * logs).sum(1)).mean()

        return self.training(loss, full_batch=self._imbalanced)

    @cached_property
    def _imbalanced(self) -> Batch:
        inner = self.parts["inner"]
        kept = self.decay ** inner["label"].double()
        rows = torch.rand(len(kept), generator=self.generator(3), dtype=torch.float64).to(kept) < kept
        label, _ = self.with_wrong_labels(inner["label"][rows], self.corrupted)
        return {"input": inner["input"][rows], "label": label}


@dataclass(frozen=True)
class LearnedAugmentation(Perceptron):
    """How much to turn, stretch, shift and blur with noise the few images of the inner run.

    Hypers: logarithms of standard deviations: ``log_angle`` (radians), ``log_scale``, ``log_shift`` [2] (halves of the image),
    ``log_noise``. Each step draws distortions of its own, functions of its number.

    Attributes:
        initial: all standard deviations.
    """

    examples: int = 100
    outer_examples: int = 500
    initial: float = 0.05

    def hypers(self, generator: Generator) -> Hypers:
        """The logarithm of ``initial`` everywhere."""
        shapes = {"log_angle": (), "log_scale": (), "log_shift": (2,), "log_noise": ()}
        return {name: torch.full(shape, math.log(self.initial), device=self.device) for name, shape in shapes.items()}

    def inner(self, step: int) -> Inner:
        """Full-batch training on images distorted anew at each step."""

        def loss(params: Params, hypers: Hypers, batch: Batch) -> Tensor:
            return F.cross_entropy(self.logits(params, hypers, self.distorted(batch, hypers)), batch["label"])

        inner = self.parts["inner"]
        return self.training(
            loss, batches=lambda t: inner | {"key": torch.tensor(step * self.inner_steps + t, device=self.device)}
        )

    def distorted(self, batch: Batch, hypers: Hypers) -> Tensor:
        """Images [n, pixels], each turned by its own angle, stretched, shifted and with noise."""
        rows = batch["input"]
        side = math.isqrt(rows.shape[1])
        draw = normal(batch["key"], (len(rows), 4), dtype=rows.dtype)
        angle = draw[:, 0] * hypers["log_angle"].exp()
        scale = (draw[:, 1] * hypers["log_scale"].exp()).exp()
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
        shift = draw[:, 2:] * hypers["log_shift"].exp()
        map_ = torch.cat([scale[:, None, None] * turn, shift[:, :, None]], 2)
        grid = F.affine_grid(map_, [len(rows), 1, side, side], align_corners=False)
        images = F.grid_sample(rows.reshape(-1, 1, side, side), grid, padding_mode="border", align_corners=False)
        noise = normal(batch["key"], tuple(rows.shape), stream=1, dtype=rows.dtype)
        return images.flatten(1) + noise * hypers["log_noise"].exp()


@dataclass(frozen=True)
class Ridge(BilevelProblem):
    """Linear regression with a penalty for each coefficient; the inner problem is solved in closed form, float64.

    w(l) = (X'X / n + diag(exp(l)))^-1 X'y / n. Half of the coefficients are 0; columns have scales from 0.3 to 3.

    Attributes:
        dimensions: of w.
        examples: of the inner problem; the outer one and the holdout have 200 each, tests 2,000.
        noise: standard deviation of the targets' noise.
        seed: of everything.
    """

    outer_steps: ClassVar[int] = 60
    dimensions: int = 20
    examples: int = 80
    noise: float = 1.0
    seed: int = 0

    @cached_property
    def _parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        generator = Generator().manual_seed(self.seed)
        scales = 10 ** (torch.rand(self.dimensions, generator=generator, dtype=torch.float64) - 0.5)
        truth = torch.randn(self.dimensions, generator=generator, dtype=torch.float64)
        truth[self.dimensions // 2 :] = 0
        parts = {}
        for name, count in {"inner": self.examples, "outer": 200, "holdout": 200, "test": 2000}.items():
            x = scales * torch.randn(count, self.dimensions, generator=generator, dtype=torch.float64)
            parts[name] = (x, x @ truth + self.noise * torch.randn(count, generator=generator, dtype=torch.float64))
        return parts

    def hypers(self, generator: Generator) -> Hypers:
        """All penalties 0.1."""
        return {"log_penalty": torch.full((self.dimensions,), math.log(0.1), dtype=torch.float64)}

    def inner(self, step: int) -> Inner:
        """No steps: the start is the solution, and depends on the hypers."""
        x, y = self._parts["inner"]

        def solution(hypers: Hypers) -> dict[str, Params]:
            hessian = x.T @ x / len(x) + hypers["log_penalty"].exp().diag()
            return {"params": {"w": torch.linalg.solve(hessian, x.T @ y / len(x))}}

        return Inner(solution, lambda state, hypers, t: state, 0, lambda state: state["params"])

    def outer(self, params: Params, hypers: Hypers, step: int) -> Tensor:
        """Mean squared error on the outer part."""
        return self.error(params, "outer")

    def holdout(self, params: Params, hypers: Hypers) -> Tensor | None:
        """Mean squared error on the holdout part."""
        return self.error(params, "holdout")

    def report(self, params: Params, hypers: Hypers) -> dict[str, float]:
        """Mean squared error on the test part."""
        return {"test_error": float(self.error(params, "test"))}

    def error(self, params: Params, part: str) -> Tensor:
        """Mean squared error on a part."""
        x, y = self._parts[part]
        return ((x @ params["w"] - y) ** 2).mean()
