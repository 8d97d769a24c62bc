"""Training an optimizer as a task: the parameters are an optimizer's, the loss is that of short runs which it makes.

The gradient goes through the whole inner run, second derivatives of the inner loss included.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import grad_and_value, vmap

from metaopt import registry, tree
from metaopt.learned import LearnedRule
from metaopt.random import sample_indices, step_keys
from metaopt.rule import Context, ParamInfo, Params, State, UpdateRule, infer_info
from metaopt.task import Batch, Split, Task
from metaopt_tasks.mlp import mlp_classifier
from metaopt_tasks.quadratic import quadratic
from metaopt_tasks.scales import ScaledTask

_START = "start."


@dataclass(eq=False)
class OptimizerTraining(ScaledTask):
    """The mean, over inner runs and their steps, of the normalised inner training loss after each update.

    An example is one inner run: ``seed`` int64 [N], for its batches, and its initial parameters ``start.<name>`` [N, ...].

    Attributes:
        inner: the task of the inner runs.
        inner_steps: updates of one.
    """

    inner: Task = field(kw_only=True)
    inner_steps: int = field(kw_only=True)

    def __post_init__(self) -> None:
        self.inner = self.inner.to(self.device)
        self._inner_info = self.inner.info()

    @abstractmethod
    def begin(self, params: Params, network: Params) -> State:
        """Initial state of the optimizer for the inner parameters ``network``."""

    @abstractmethod
    def move(
        self, params: Params, t: int, grads: Params, state: State, network: Params, ctx: Context
    ) -> tuple[Params, State]:
        """Update number ``t``: new inner parameters and state."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """See the class; a mean over the runs in the batch."""
        runs_of_batch = {name: batch[name] for name in self.train.tensors}
        return vmap(lambda run: self._run(params, run))(runs_of_batch).mean()

    def _run(self, params: Params, run: Batch) -> Tensor:
        network = {name.removeprefix(_START): value for name, value in run.items() if name.startswith(_START)}
        dtype = next(iter(network.values())).dtype
        state, buffers, losses = self.begin(params, network), cast(self.inner.buffers(), dtype), []
        step = grad_and_value(self.inner.training_loss, has_aux=True)
        for t in range(self.inner_steps):
            time = torch.full_like(run["seed"], t)
            grads, (value, buffers) = step(network, buffers, self._inner_batch(run["seed"], time, dtype))
            losses.append(value)
            ctx = Context(self._inner_info, step=time, loss=value, horizon=self.inner_steps)
            network, state = self.move(params, t, grads, state, network, ctx)
        last = torch.full_like(run["seed"], self.inner_steps)
        losses.append(self.inner.training_loss(network, buffers, self._inner_batch(run["seed"], last, dtype))[0])
        return self.inner.normalize(torch.stack(losses[1:])).mean()

    def _inner_batch(self, seed: Tensor, time: Tensor, dtype: torch.dtype) -> Batch:
        """What an unroll would give the inner task at this step."""
        inner = self.inner
        rows = sample_indices(seed[None], time[None], inner.batch_size, len(inner.train))[0]
        batch = cast(inner.train.take(rows) | inner.config, dtype)
        return batch | ({"random": step_keys(seed, time)} if inner.stochastic else {})


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """Floating-point tensors in ``dtype``, others as they are."""
    return tree.map_tree(lambda t: t.to(dtype) if t.is_floating_point() else t, dict(batch))


@dataclass(eq=False)
class ThetaTraining(OptimizerTraining):
    """Meta-training of a learned optimizer by backpropagation; parameters: its theta.

    Attributes:
        learned: whose theta.
        inner_lr: the learned optimizer's hyperparameter ``lr``, a constant factor of its steps.
    """

    learned: LearnedRule = field(kw_only=True)
    inner_lr: float = field(kw_only=True)

    def init(self, generator: Generator) -> Params:
        """The learned optimizer's own."""
        return self.learned.init_theta(generator)

    def begin(self, params: Params, network: Params) -> State:
        """The learned optimizer's initial state."""
        return self.learned.init(network, self._inner_info, params)

    def move(
        self, params: Params, t: int, grads: Params, state: State, network: Params, ctx: Context
    ) -> tuple[Params, State]:
        """The learned optimizer's step."""
        hp = {**self.learned.hp, "lr": self.inner_lr}
        return self.learned.update(params, grads, state, network, hp, ctx)

    def info(self) -> dict[str, ParamInfo]:
        """Of the matrices, the first is the input and the last the output; vectors are biases."""
        theta = self.init(Generator().manual_seed(0))
        matrices = [name for name, value in theta.items() if value.dim() > 1]
        roles = {name: "bias" for name, value in theta.items() if value.dim() == 1}
        return infer_info(theta, roles | {matrices[0]: "input", matrices[-1]: "output"})


@dataclass(eq=False)
class ScheduleTraining(OptimizerTraining):
    """Learning the learning rate of every step and the momentum of SGD (Maclaurin et al. 2015, arXiv:1502.03492).

    Parameters: ``log_lr`` [inner_steps], and ``momentum_logit`` [1], whose sigmoid is the momentum.

    Attributes:
        rule: SGD, with hyperparameters ``lr`` and ``momentum``.
        inner_lr: the learning rates at the start.
    """

    rule: UpdateRule = field(kw_only=True)
    inner_lr: float = field(kw_only=True)

    def init(self, generator: Generator) -> Params:
        """Learning rates about ``inner_lr``, momentum about 0.1."""
        noise = 0.01 * torch.randn(self.inner_steps + 1, generator=generator)
        return {"log_lr": math.log(self.inner_lr) + noise[1:], "momentum_logit": noise[:1] - 2.2}

    def begin(self, params: Params, network: Params) -> State:
        """SGD's initial state."""
        return self.rule.init(network, self._inner_info)

    def move(
        self, params: Params, t: int, grads: Params, state: State, network: Params, ctx: Context
    ) -> tuple[Params, State]:
        """SGD's step with this step's learning rate."""
        learned = {"lr": params["log_lr"][t].exp(), "momentum": params["momentum_logit"][0].sigmoid()}
        return self.rule.update(grads, state, network, {**self.rule.hp, **learned}, ctx)

    def info(self) -> dict[str, ParamInfo]:
        """Both are multiplied with nothing: biases."""
        params = self.init(Generator().manual_seed(0))
        return infer_info(params, dict.fromkeys(params, "bias"))


def runs(inner: Task, size: int, first: int) -> Split:
    """``size`` inner runs with seeds from ``first`` on, and their initial parameters."""
    seeds = range(first, first + size)
    starts = tree.stack([inner.init(Generator().manual_seed(seed)) for seed in seeds])
    return Split({"seed": torch.tensor(list(seeds))} | {_START + name: value for name, value in starts.items()})


def learned_optimizer(
    name: str = "learned_optimizer",
    optimizer: str = "sgd",
    data: str = "",
    hidden: Sequence[int] = (),
    dim: int = 10,
    condition: float = 20.0,
    units: int = 4,
    inner_steps: int = 5,
    inner_lr: float = 0.05,
    inner_batch_size: int = 32,
    batch_size: int = 4,
    horizon: int = 200,
    device: Any = "cpu",
) -> OptimizerTraining:
    """Training of an optimizer on one inner task; normalised, 1 is an inner model that knows nothing.

    Args:
        name: of the task.
        optimizer: ``sgd`` for a `ScheduleTraining`, or a registered learned optimizer with an option ``hidden``.
        data: a labelled source, for inner classifiers; empty: a noisy quadratic bowl.
        hidden: widths of the inner classifier; empty for a linear one.
        dim: of the bowl.
        condition: of the bowl.
        units: width of the learned optimizer.
        inner_steps: updates of an inner run.
        inner_lr: see `ScheduleTraining` and `ThetaTraining`.
        inner_batch_size: examples of an inner step.
        batch_size: inner runs of an outer step.
        horizon: outer steps.
        device: of all data.
    """
    if data:
        inner: Task = mlp_classifier(f"{name}_inner", data, hidden, "tanh", batch_size=inner_batch_size)
    else:
        inner = quadratic(dim=dim, condition=condition, noise=1.0, batch_size=inner_batch_size)
    train, valid, test = (runs(inner, size, first).to(device) for size, first in ((512, 0), (64, 10_000), (64, 20_000)))
    common: dict[str, Any] = {"inner": inner, "inner_steps": inner_steps, "inner_lr": inner_lr}
    if optimizer == "sgd":
        rule = registry.create("optimizer", "sgd")
        return ScheduleTraining(name, train, valid, test, batch_size, horizon, rule=rule, **common)
    learned = registry.create("learned_optimizer", optimizer, hidden=units)
    return ThetaTraining(name, train, valid, test, batch_size, horizon, learned=learned, **common)
