"""Few-shot meta-learning: find initial parameters from which a few gradient steps learn an episode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, cross_entropy, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

_RATE = "log_inner_lr"


@dataclass(eq=False)
class FewShot(ScaledTask):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine 2017, arXiv:1703.03400), with second derivatives.

    The loss of an episode is that of its query set after ``inner_steps`` gradient steps on its support set, from the
    parameters; cross-entropy where the episodes have labels, else mean squared error.

    Attributes:
        hidden: widths of the network.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        inner_steps: gradient steps on the support set.
        inner_lr: their learning rate.
        learned_lr: the parameters hold the logarithm of the inner learning rate, which starts at ``inner_lr``.
    """

    hidden: tuple[int, ...] = (32,)
    activation: str = "tanh"
    inner_steps: int = 1
    inner_lr: float = 0.1
    learned_lr: bool = False

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        tensors = self.train.tensors
        labelled = "support_label" in tensors
        self._answer = "label" if labelled else "target"
        self._criterion = cross_entropy if labelled else F.mse_loss
        outputs = int(tensors["support_label"].max()) + 1 if labelled else tensors["support_target"].shape[2]
        self._sizes = (tensors["support_input"].shape[2], *self.hidden, outputs)

    def init(self, generator: Generator) -> Params:
        """LeCun or He normal weights by activation, a small head, zero biases; and the inner rate if it is learned."""
        rate = {_RATE: torch.tensor(math.log(self.inner_lr))} if self.learned_lr else {}
        return mlp_params(self._sizes, generator, ACTIVATIONS[self.activation][1]) | rate

    def adapt(self, params: Params, inputs: Tensor, answers: Tensor) -> Params:
        """The network's parameters after the inner steps on one support set: inputs [n, features], answers [n, ...]."""
        network = {name: p for name, p in params.items() if name != _RATE}
        rate = params[_RATE].exp() if self.learned_lr else self.inner_lr
        for _ in range(self.inner_steps):
            slopes = grad(self._error)(network, inputs, answers)
            network = {name: p - rate * slopes[name] for name, p in network.items()}
        return network

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean query loss of the episodes in the batch, each after its own inner steps."""

        def of_episode(episode: Batch) -> Tensor:
            adapted = self.adapt(params, episode["support_input"], episode[f"support_{self._answer}"])
            return self._error(adapted, episode["query_input"], episode[f"query_{self._answer}"])

        names = [f"{part}_{what}" for part in ("support", "query") for what in ("input", self._answer)]
        return vmap(of_episode)({name: batch[name] for name in names}).mean()

    def _error(self, network: Params, inputs: Tensor, answers: Tensor) -> Tensor:
        return self._criterion(mlp(network, inputs, ACTIVATIONS[self.activation][0]), answers)

    def info(self) -> dict[str, ParamInfo]:
        """The first layer is the input, the head the output."""
        roles = {"fc1.weight": "input", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def few_shot(
    name: str = "few_shot",
    data: str = "sine_episodes",
    hidden: Sequence[int] = (32,),
    activation: str = "tanh",
    inner_steps: int = 1,
    inner_lr: float = 0.1,
    learned_lr: bool = False,
    batch_size: int = 8,
    horizon: int = 200,
    device: Any = "cpu",
) -> FewShot:
    """A `FewShot` on a source of episodes, ``batch_size`` of them per step; normalised, 1 is predicting a constant."""
    splits = load(data, device)
    tensors = splits["train"].tensors
    if "query_label" in tensors:
        scale = math.log(int(tensors["query_label"].max()) + 1)
    else:
        scale = float(tensors["query_target"].var())
    return FewShot(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon, scale=scale, hidden=tuple(hidden),
        activation=activation, inner_steps=inner_steps, inner_lr=inner_lr, learned_lr=learned_lr,
    )  # fmt: skip
