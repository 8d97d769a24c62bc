"""Multi-layer perceptrons on any labelled or regression data source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.dense.network import DenseNetwork
from metaopt.random import uniform
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split, Task
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.draws import student_t
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import (
    ACTIVATIONS,
    NORMS,
    cross_entropy,
    hidden_weight,
    linear,
    norm,
    norm_params,
    output_weight,
)
from metaopt_tasks.scales import CrossEntropyTask, ScaledTask


@dataclass(eq=False)
class MLP(Task):
    """inputs -> hidden layers, each linear, norm, activation -> linear head; laid out as by ``nn.Linear``.

    Attributes:
        hidden: widths; empty for a linear model.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        initializer: a name in `metaopt_tasks.layers.INITIALIZERS`, scaled for the activation, times ``init_scale``.
        norm: ``none``, ``layer`` or ``rms``, in front of each activation.
    """

    hidden: tuple[int, ...] = (32,)
    activation: str = "relu"
    initializer: str = "normal"
    init_scale: float = 1.0
    norm: str = "none"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("norm", self.norm, NORMS)
        self._inputs = self.train.tensors["input"][0].numel()

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return self.train.tensors["target"].shape[1]

    def init(self, generator: Generator) -> Params:
        """Hidden weights by ``initializer``, a small head, zero biases."""
        gain = ACTIVATIONS[self.activation][1] * self.init_scale
        params: Params = {}
        width = self._inputs
        for i, new in enumerate(self.hidden, start=1):
            params[f"fc{i}.weight"] = hidden_weight((new, width), generator, gain, self.initializer)
            params[f"fc{i}.bias"] = torch.zeros(new)
            params |= norm_params(f"norm{i}", new, self.norm)
            width = new
        last = f"fc{len(self.hidden) + 1}"
        return params | {
            f"{last}.weight": output_weight((self.outputs, width), generator),
            f"{last}.bias": torch.zeros(self.outputs),
        }

    def predict(self, params: Params, inputs: Tensor, drop: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
        """Inputs [B, ...] -> [B, outputs]; ``drop(h, i)`` replaces what the i-th hidden layer [B, width] gives."""
        act = ACTIVATIONS[self.activation][0]
        h = inputs.flatten(1)
        for i in range(1, len(self.hidden) + 1):
            h = act(norm(params, f"norm{i}", linear(params, f"fc{i}", h), self.norm))
            h = h if drop is None else drop(h, i)
        return linear(params, f"fc{len(self.hidden) + 1}", h)

    def _dense(self, loss: str, target: str, label_smoothing: float = 0.0) -> DenseNetwork | None:
        """The network of `predict` under this loss, if it has no norms."""
        if self.norm != "none":
            return None
        layers = tuple((f"fc{i}.weight", f"fc{i}.bias") for i in range(1, len(self.hidden) + 2))
        return DenseNetwork(layers, self.activation, loss, label_smoothing, "input", target)

    def info(self) -> dict[str, ParamInfo]:
        """The first layer is the input, the last the output; the only layer of a linear model is the output."""
        last = f"fc{len(self.hidden) + 1}.weight"
        return infer_info(self.init(Generator().manual_seed(0)), {"fc1.weight": "input", last: "output"})


def squared_error(outputs: Tensor, label: Tensor) -> Tensor:
    """Squared distance of ``outputs`` [B, C] to centred one-hot labels; the mean over B. All-zero outputs: 1 - 1 / C."""
    classes = outputs.shape[1]
    one_hot = F.one_hot(label, classes).to(outputs.dtype)
    return (outputs - one_hot + 1 / classes).square().sum(1).mean()


def hinge(outputs: Tensor, label: Tensor) -> Tensor:
    """Weston and Watkins 1999, as ``F.multi_margin_loss``: mean over classes of max(0, 1 + z_j - z_label), j != label."""
    margins = 1 + outputs - outputs.gather(1, label[:, None])
    others = 1 - F.one_hot(label, outputs.shape[1]).to(outputs.dtype)
    return (torch.relu(margins) * others).mean()


CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[int], float]]] = {
    "cross_entropy": (cross_entropy, math.log),
    "squared_error": (squared_error, lambda classes: 1 - 1 / classes),
    "hinge": (hinge, lambda classes: 1 - 1 / classes),
}
"""Name -> (loss of outputs [B, C] and labels [B], its value for C equal outputs)."""


@dataclass(eq=False)
class MLPClassifier(MLP, CrossEntropyTask):
    """An `MLP` whose loss is of its outputs and ``label``.

    Attributes:
        criterion: a name in `CRITERIA`.
        label_smoothing: of training's cross-entropy (Szegedy et al. 2016); judging has none.
    """

    criterion: str = "cross_entropy"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("criterion", self.criterion, CRITERIA)
        if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and self.criterion != "cross_entropy"):
            raise ValueError(
                f"label_smoothing must be in [0, 1), and 0 unless criterion is cross_entropy, got {self.label_smoothing}"
            )

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.classes

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The mean ``criterion`` of ``input`` [B, ...] and ``label`` [B]."""
        return CRITERIA[self.criterion][0](self.predict(params, batch["input"]), batch["label"])

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """With smoothed labels, if asked for."""
        return self._training_criterion(self.predict(params, batch["input"]), batch["label"]), buffers

    def _training_criterion(self, outputs: Tensor, label: Tensor) -> Tensor:
        if self.label_smoothing:
            return cross_entropy(outputs, label, self.label_smoothing)
        return CRITERIA[self.criterion][0](outputs, label)

    @property
    def dense(self) -> DenseNetwork | None:
        """Without norms; a subclass, whose training loss may be another, has none."""
        if type(self) is not MLPClassifier:
            return None
        return self._dense(self.criterion, "label", self.label_smoothing)

    def normalize(self, loss: Tensor) -> Tensor:
        """As of a cross-entropy: 0 is the best, 1 equal outputs for all classes, 1.5 the worst that counts."""
        return super().normalize(loss * (math.log(self.classes) / CRITERIA[self.criterion][1](self.classes)))


@dataclass(eq=False)
class DropoutMLPClassifier(MLPClassifier):
    """An `MLPClassifier` that forgets hidden units while training (Srivastava et al. 2014).

    Attributes:
        dropout: probability that a unit is set to 0; the others grow by 1 / (1 - dropout).
    """

    stochastic: ClassVar[bool] = True

    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dropout < 1:
            raise ValueError(f"dropout must be in (0, 1), got {self.dropout}; MLPClassifier has none")

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """With other units dropped in every example and layer."""

        def drop(h: Tensor, layer: int) -> Tensor:
            kept = uniform(batch["random"], h.shape, layer, h.dtype) >= self.dropout
            return h * kept / (1 - self.dropout)

        return self._training_criterion(self.predict(params, batch["input"], drop), batch["label"]), buffers


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


@dataclass(eq=False)
class MLPRegressor(MLP, ScaledTask):
    """An `MLP` that predicts ``target``.

    Attributes:
        criterion: ``mse``, ``l1`` or ``huber``.
    """

    criterion: str = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("criterion", self.criterion, LOSSES)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean loss of ``input`` [B, ...] and ``target`` [B, outputs]."""
        return LOSSES[self.criterion](self.predict(params, batch["input"]), batch["target"])

    @property
    def dense(self) -> DenseNetwork | None:
        """Of ``mse`` without norms; a subclass, whose training loss may be another, has none."""
        if type(self) is not MLPRegressor or self.criterion != "mse":
            return None
        return self._dense("mse", "target")


def mlp_classifier(
    name: str = "mlp_classifier",
    data: str = "digits",
    hidden: Sequence[int] = (32,),
    activation: str = "relu",
    initializer: str = "normal",
    init_scale: float = 1.0,
    norm: str = "none",
    criterion: str = "cross_entropy",
    label_smoothing: float = 0.0,
    dropout: float = 0.0,
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> MLPClassifier:
    """An MLP on a labelled data source; see `MLP`, `MLPClassifier` and `DropoutMLPClassifier` for the arguments."""
    splits = load(data, device)
    make = partial(DropoutMLPClassifier, dropout=dropout) if dropout else MLPClassifier
    return make(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, classes=classes_of(splits),
        hidden=tuple(hidden), activation=activation, initializer=initializer, init_scale=init_scale, norm=norm,
        criterion=criterion, label_smoothing=label_smoothing,
    )  # fmt: skip


def mlp_regressor(
    name: str = "mlp_regressor",
    data: str = "diabetes",
    hidden: Sequence[int] = (32,),
    activation: str = "tanh",
    initializer: str = "normal",
    init_scale: float = 1.0,
    norm: str = "none",
    criterion: str = "mse",
    noise_freedom: float = 0.0,
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> MLPRegressor:
    """An MLP on a regression data source, whose loss is measured in that of predicting the mean; see `MLP`.

    ``noise_freedom``: degrees of freedom of Student's t noise, of scale 1, in the targets of the train split alone; 0: none.
    With few of them gradients have heavy tails (up to 2, infinite variance): most are small, rare ones huge.
    """
    splits = load(data, device)
    target = splits["train"].tensors["target"]
    require_choice("criterion", criterion, LOSSES)
    if not 0 <= noise_freedom < math.inf:
        raise ValueError(f"noise_freedom must be in [0, inf), got {noise_freedom}; 0 is without noise")
    scale = float(LOSSES[criterion](target.mean(0).expand_as(target), target))
    train = splits["train"]
    if noise_freedom:
        noise = student_t(Generator().manual_seed(0), noise_freedom, *target.shape).to(target)
        train = Split(train.tensors | {"target": target + noise})
    return MLPRegressor(
        name, train, splits["valid"], splits["test"], batch_size, horizon, scale=scale,
        hidden=tuple(hidden), activation=activation, initializer=initializer, init_scale=init_scale, norm=norm,
        criterion=criterion,
    )  # fmt: skip
