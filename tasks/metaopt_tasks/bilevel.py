"""Bilevel problems: outer parameters of an inner training run, judged by what the run learnt.

The inner problem is a softmax regression, trained by some full-batch gradient steps from zero inside the loss; its gradient is
written out, so the whole loss is a plain differentiable function, and its gradient the exact hypergradient of the run.
The outer splits hold clean examples that the inner run never sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.random import hash64, normal
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import cross_entropy
from metaopt_tasks.scales import CrossEntropyTask

_CORRUPTION_SEED = 1 << 20


@dataclass(eq=False)
class InnerRegression(CrossEntropyTask):
    """What the bilevel tasks share: an inner softmax regression, and cross-entropy of its predictions on the outer batch.

    Attributes:
        inner: what the inner run trains on: ``input`` [n, ...] and ``label`` [n], perhaps corrupted.
        inner_steps: gradient steps of the inner run.
        inner_lr: their learning rate, for a loss that is a mean.
    """

    inner: Split = field(default_factory=Split)
    inner_steps: int = 10
    inner_lr: float = 0.5

    def __post_init__(self) -> None:
        self.inner = self.inner.to(self.device)
        tensors = self.inner.tensors
        self._targets = F.one_hot(tensors["label"], self.classes).T.float()
        self._inputs = with_one(tensors["input"])

    def judge(self, weight: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy on the outer batch of a regression with ``weight`` [classes, features + 1]."""
        return cross_entropy(F.linear(with_one(batch["input"]).to(weight.dtype), weight), batch["label"])

    def info(self) -> dict[str, ParamInfo]:
        """Outer parameters act one by one and are multiplied with nothing: biases, whatever their shape."""
        params = self.init(Generator().manual_seed(0))
        return infer_info(params, dict.fromkeys(params, "bias"))


def with_one(inputs: Tensor) -> Tensor:
    """Inputs [n, ...] as rows with a constant feature appended [n, features + 1]."""
    rows = inputs.flatten(1)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def regression(
    inputs: Tensor, targets: Tensor, shares: Tensor, steps: int, lr: float, decay: Tensor | float = 0.0
) -> Tensor:
    """Weights [classes, features] of a softmax regression after gradient steps from zero.

    The loss is sum_i shares_i CE_i + sum(decay weight^2) / 2; its gradient is (shares (softmax - targets)) X + decay weight.

    Args:
        inputs: [n, features].
        targets: [classes, n], one-hot columns.
        shares: [n], of each example in the loss; a mean has 1 / n.
        steps: of gradient descent.
        lr: its learning rate.
        decay: 0, or one for each weight [classes, features].
    """
    # examples last: a softmax over a short last dimension is slow under vmap
    weight = torch.zeros_like(targets @ inputs)
    for _ in range(steps):
        residual = ((weight @ inputs.mT).softmax(0) - targets) * shares
        weight = weight - lr * (residual @ inputs + decay * weight)
    return weight


@dataclass(eq=False)
class HyperCleaning(InnerRegression):
    """One weight for every inner example, many of which have wrong labels (Franceschi et al. 2017, arXiv:1703.01785).

    Parameter ``example_logits`` [n]; an example has the weight 2 sigmoid(logit) / n in the inner loss.
    """

    def init(self, generator: Generator) -> Params:
        """Small normal logits: all weights are about 1 / n."""
        return {"example_logits": 0.01 * torch.randn(len(self.inner), generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Cross-entropy on clean examples after the inner run on the weighted ones."""
        logits = params["example_logits"]
        inputs, targets = self._inputs.to(logits.dtype), self._targets.to(logits.dtype)
        shares = 2 * logits.sigmoid() / len(inputs)
        return self.judge(regression(inputs, targets, shares, self.inner_steps, self.inner_lr), batch)


@dataclass(eq=False)
class WeightDecay(InnerRegression):
    """One weight decay for every weight of the inner run, as a logarithm (Lorraine et al. 2020, arXiv:1911.02590).

    Parameter ``log_decay`` [classes, features + 1].

    Attributes:
        initial_decay: of every weight.
    """

    initial_decay: float = 0.01

    def init(self, generator: Generator) -> Params:
        """About the logarithm of ``initial_decay``."""
        shape = (self.classes, self._inputs.shape[1])
        return {"log_decay": math.log(self.initial_decay) + 0.01 * torch.randn(shape, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Cross-entropy on other examples after the inner run with these decays."""
        decay = params["log_decay"].exp()
        inputs, targets = self._inputs.to(decay.dtype), self._targets.to(decay.dtype)
        shares = torch.full_like(targets[0], 1 / len(inputs))
        return self.judge(regression(inputs, targets, shares, self.inner_steps, self.inner_lr, decay), batch)


@dataclass(eq=False)
class LearnedAugmentation(InnerRegression):
    """How to distort the few images of the inner run: by which shifts, and with how much noise in each pixel.

    Parameters: ``shift_logits`` [(2 reach + 1)^2], whose softmax weighs the shifted copies of all images (the expectation
    over shifts is exact); ``log_noise`` [pixels], the logarithm of the noise's standard deviation.

    Attributes:
        reach: largest shift, in pixels; pixels that a shift brings in are the images' smallest value.
    """

    stochastic: ClassVar[bool] = True
    reach: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.inner.tensors["input"]
        height, width = images.shape[-2:]
        wide = F.pad(images, (self.reach,) * 4, value=float(images.min()))
        spans = range(2 * self.reach + 1)
        self._shifted = torch.cat([wide[..., i : i + height, j : j + width].flatten(1) for i in spans for j in spans])
        self._copies = len(spans) ** 2

    def init(self, generator: Generator) -> Params:
        """All shifts alike, noise of about 0.1."""
        pixels = self._shifted.shape[1]
        return {
            "shift_logits": 0.01 * torch.randn(self._copies, generator=generator),
            "log_noise": math.log(0.1) + 0.01 * torch.randn(pixels, generator=generator),
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Cross-entropy on undistorted examples after the inner run on distorted ones; the noise is drawn once."""
        weights, spread = params["shift_logits"].softmax(0), params["log_noise"].exp()
        noise = normal(batch["random"], (len(self.inner), len(spread)), dtype=spread.dtype)  # one for all shifts
        inputs = with_one(self._shifted.to(spread.dtype) + (spread * noise).repeat(self._copies, 1))
        targets = self._targets.to(spread.dtype).repeat(1, self._copies)
        shares = (weights / len(self.inner)).repeat_interleave(len(self.inner))
        return self.judge(regression(inputs, targets, shares, self.inner_steps, self.inner_lr), batch)


def inner_and_outer(data: str, examples: int, corrupted: float, device: Any) -> tuple[Split, dict[str, Split], int]:
    """(inner examples, outer splits, classes): the first ``examples`` rows of train in hash order are the inner ones.

    Args:
        data: a registered source with ``input`` and ``label``.
        examples: for the inner run; the rest of train is the outer train split.
        corrupted: share of inner examples whose label is replaced by another one, always the same.
        device: of the data.
    """
    splits = load(data, device)
    train, classes = splits["train"], classes_of(splits)
    if not 0 < examples < len(train):
        raise ValueError(f"examples must be in [1, {len(train) - 1}] for {data!r}, got {examples}")
    if not 0 <= corrupted < 1:
        raise ValueError(f"corrupted must be in [0, 1), got {corrupted}: a share of the inner examples")
    order = hash64(torch.arange(len(train))).argsort().to(device)
    inner = train.take(order[:examples])
    wrong = torch.arange(examples) < round(corrupted * examples)
    shift = 1 + (hash64(torch.arange(examples) + _CORRUPTION_SEED) >> 33) % (classes - 1)
    label = (inner["label"] + (wrong * shift).to(device)) % classes
    outer = {"train": Split(train.take(order[examples:])), "valid": splits["valid"], "test": splits["test"]}
    return Split({"input": inner["input"], "label": label}), outer, classes


def _make(
    kind: type[InnerRegression], name: str, data: str, examples: int, corrupted: float, batch_size: int, horizon: int,
    device: Any, **arguments: Any,
) -> Any:  # fmt: skip
    inner, outer, classes = inner_and_outer(data, examples, corrupted, device)
    return kind(
        name, outer["train"], outer["valid"], outer["test"], batch_size, horizon, classes=classes, inner=inner,
        **arguments,
    )  # fmt: skip


def hyper_cleaning(
    name: str = "hyper_cleaning",
    data: str = "digits",
    examples: int = 200,
    corrupted: float = 0.5,
    inner_steps: int = 10,
    inner_lr: float = 0.5,
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> HyperCleaning:
    """A `HyperCleaning` of ``examples`` inner examples, a share ``corrupted`` of them with wrong labels."""
    return _make(
        HyperCleaning, name, data, examples, corrupted, batch_size, horizon, device,
        inner_steps=inner_steps, inner_lr=inner_lr,
    )  # fmt: skip


def weight_decay(
    name: str = "weight_decay",
    data: str = "digits",
    examples: int = 60,
    corrupted: float = 0.0,
    inner_steps: int = 10,
    inner_lr: float = 0.5,
    initial_decay: float = 0.01,
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> WeightDecay:
    """A `WeightDecay` of an inner run on few examples."""
    return _make(
        WeightDecay, name, data, examples, corrupted, batch_size, horizon, device,
        inner_steps=inner_steps, inner_lr=inner_lr, initial_decay=initial_decay,
    )  # fmt: skip


def learned_augmentation(
    name: str = "learned_augmentation",
    data: str = "digits",
    examples: int = 30,
    reach: int = 1,
    inner_steps: int = 10,
    inner_lr: float = 0.5,
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> LearnedAugmentation:
    """A `LearnedAugmentation` of an inner run on few images; the source's ``input`` must be [N, C, H, W]."""
    return _make(
        LearnedAugmentation, name, data, examples, 0.0, batch_size, horizon, device,
        inner_steps=inner_steps, inner_lr=inner_lr, reach=reach,
    )  # fmt: skip
