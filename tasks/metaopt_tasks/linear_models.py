"""Linear, LASSO and logistic regression on any table: convex problems, whose best training loss is computed and is 0."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.data.load import classes_of, load
from metaopt_tasks.layers import cross_entropy, linear, output_weight
from metaopt_tasks.scales import ScaledTask


@dataclass(eq=False)
class LinearModel(ScaledTask):
    """One linear layer from inputs [B, ...] to [B, outputs]: parameters ``head.weight`` and ``head.bias``.

    ``floor`` is the lowest loss on the train split, and ``floor + scale`` that of the best model that ignores its input.

    Attributes:
        l2: times half the squared weights (not the bias) is added to the loss.
    """

    l2: float = 0.0

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many numbers the model predicts."""

    @abstractmethod
    def optimum(self) -> Params:
        """Float64 parameters with the lowest loss on the train split."""

    @abstractmethod
    def constant(self) -> Params:
        """Float64 parameters of the best model on the train split whose weights are 0."""

    def init(self, generator: Generator) -> Params:
        """Small weights and no bias."""
        features = self.train.tensors["input"][0].numel()
        return {
            "head.weight": output_weight((self.outputs, features), generator),
            "head.bias": torch.zeros(self.outputs),
        }

    def info(self) -> dict[str, ParamInfo]:
        """The only layer is the output."""
        return infer_info(self.init(Generator().manual_seed(0)), {"head.weight": "output"})

    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] -> [B, outputs]."""
        return linear(params, "head", inputs.flatten(1))

    def penalty(self, params: Params) -> Tensor:
        """What is added to the loss of the predictions."""
        return 0.5 * self.l2 * params["head.weight"].square().sum()

    def measured(self) -> Self:
        """This task with ``floor`` and ``scale`` set, from train data on the CPU."""
        train = {key: t.double() if t.is_floating_point() else t for key, t in self.train.tensors.items()}
        self.floor = float(self.loss(self.optimum(), train))
        self.scale = float(self.loss(self.constant(), train)) - self.floor
        return self


@dataclass(eq=False)
class LinearRegression(LinearModel):
    """Half the squared error of ``target`` [B, outputs], plus the penalties: ridge, LASSO or elastic net.

    Attributes:
        l1: times the sum of the weights' magnitudes is added to the loss (Tibshirani 1996).
    """

    l1: float = 0.0

    @property
    def outputs(self) -> int:
        """Width of the target."""
        return self.train.tensors["target"].shape[1]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean over the batch of half the squared error, plus penalties."""
        error = self.predict(params, batch["input"]) - batch["target"]
        return 0.5 * error.square().sum(1).mean() + self.penalty(params)

    def penalty(self, params: Params) -> Tensor:
        """l1 |W|_1 + l2 / 2 |W|^2."""
        return super().penalty(params) + self.l1 * params["head.weight"].abs().sum()

    def optimum(self) -> Params:
        """From the normal equations if l1 is 0, else by scikit-learn's coordinate descent."""
        inputs, target = (self.train.tensors[key].double().flatten(1) for key in ("input", "target"))
        x, y = inputs - inputs.mean(0), target - target.mean(0)
        if self.l1 == 0:
            # ridge as least squares with extra rows, which keeps the square root of the normal equations' condition
            size = x.shape[1]
            extra = (self.l2 * len(x)) ** 0.5 * torch.eye(size, dtype=x.dtype)
            padded = torch.cat([y, y.new_zeros(size, y.shape[1])])
            weight = torch.linalg.lstsq(torch.cat([x, extra]), padded, driver="gelsd").solution.T
        else:
            from sklearn.linear_model import ElasticNet

            total = self.l1 + self.l2
            model = ElasticNet(total, l1_ratio=self.l1 / total, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
            rows = [model.fit(x.numpy(), column.numpy()).coef_.copy() for column in y.T]
            weight = torch.stack([torch.as_tensor(row) for row in rows])
        return {"head.weight": weight, "head.bias": target.mean(0) - weight @ inputs.mean(0)}

    def constant(self) -> Params:
        """The mean target."""
        target = self.train.tensors["target"].double()
        features = self.train.tensors["input"][0].numel()
        return {"head.weight": target.new_zeros(self.outputs, features), "head.bias": target.mean(0)}


@dataclass(eq=False)
class LogisticRegression(LinearModel):
    """Cross-entropy of ``label`` [B] under a softmax of linear logits, plus the penalty; ``l2`` is above 0.

    The penalty makes the best loss one that is reached, whether or not the classes can be separated.
    """

    classes: int = 2

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.classes

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy, plus l2 / 2 |W|^2."""
        return cross_entropy(self.predict(params, batch["input"]), batch["label"]) + self.penalty(params)

    def optimum(self) -> Params:
        """By scikit-learn's Newton method."""
        from sklearn.linear_model import LogisticRegression as Newton

        inputs, label = self.train.tensors["input"].double().flatten(1), self.train.tensors["label"]
        # with two classes scikit-learn has one row w, which stands for the rows -w/2 and w/2: half the penalty
        strength = self.l2 * len(label) * (0.5 if self.classes == 2 else 1.0)
        model = Newton(C=1 / strength, solver="newton-cg", tol=1e-10, max_iter=10_000)
        model.fit(inputs.numpy(), label.numpy())
        weight, bias = torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)
        if self.classes == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return {"head.weight": weight, "head.bias": bias}

    def constant(self) -> Params:
        """Each class by its share."""
        shares = self.train.tensors["label"].bincount(minlength=self.classes).double()
        features = self.train.tensors["input"][0].numel()
        return {"head.weight": shares.new_zeros(self.classes, features), "head.bias": (shares / shares.sum()).log()}


def linear_regression(
    name: str = "linear_regression",
    data: str = "ill_conditioned_regression",
    l1: float = 0.0,
    l2: float = 0.0,
    batch_size: int = 32,
    horizon: int = 200,
    device: Any = "cpu",
) -> LinearRegression:
    """Linear regression on a data source with ``target``; see `LinearRegression` for the penalties."""
    for penalty, value in (("l1", l1), ("l2", l2)):
        if value < 0:
            raise ValueError(f"{penalty} must be at least 0, got {value}")
    splits = load(data)
    task = LinearRegression(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, l1=l1, l2=l2
    )  # fmt: skip
    return task.measured().to(device)


def logistic_regression(
    name: str = "logistic_regression",
    data: str = "iris",
    l2: float = 1e-3,
    batch_size: int = 32,
    horizon: int = 200,
    device: Any = "cpu",
) -> LogisticRegression:
    """Logistic regression on a data source with ``label``; see `LogisticRegression`."""
    if l2 <= 0:
        raise ValueError(f"l2 must be above 0, got {l2}: without it separable classes have no best loss")
    splits = load(data)
    task = LogisticRegression(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, l2=l2, classes=classes_of(splits)
    )  # fmt: skip
    return task.measured().to(device)
