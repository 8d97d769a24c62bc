"""Preference optimisation with small policies: what losses for learning from ranked pairs are scored on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt import registry
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

Objective = Callable[[Tensor], Tensor]
"""rho [B] -> loss of each pair [B]; rho is how much more the policy than its reference favours the chosen answer, in nats."""


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta rho) (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: float = 0.5

    def __call__(self, rho: Tensor) -> Tensor:
        """Rho [B] -> [B]."""
        return -F.logsigmoid(self.beta * rho)


@dataclass(frozen=True)
class IPO:
    """(rho - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036)."""

    beta: float = 0.5

    def __call__(self, rho: Tensor) -> Tensor:
        """Rho [B] -> [B]."""
        return (rho - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SLiC:
    """max(0, 1 - beta rho): the hinge loss (Zhao et al. 2023, arXiv:2305.10425)."""

    beta: float = 0.5

    def __call__(self, rho: Tensor) -> Tensor:
        """Rho [B] -> [B]."""
        return torch.relu(1 - self.beta * rho)


@dataclass(frozen=True)
class Exponential:
    """exp(-beta rho), AdaBoost's loss (Tang et al. 2024, arXiv:2402.05749)."""

    beta: float = 0.5

    def __call__(self, rho: Tensor) -> Tensor:
        """Rho [B] -> [B]."""
        return torch.exp(-self.beta * rho)


@dataclass(frozen=True)
class LogRatioModulated:
    """(1 - s) DPO + s exp(-z), z = beta rho, s = sigmoid(z / tau): DiscoPOP (Lu et al. 2024, arXiv:2406.08414)."""

    beta: float = 0.5
    tau: float = 0.05

    def __call__(self, rho: Tensor) -> Tensor:
        """Rho [B] -> [B]."""
        z = self.beta * rho
        # s exp(-z) as one exponential: for very negative z it is 0 times infinity otherwise
        return -torch.sigmoid(-z / self.tau) * F.logsigmoid(z) + torch.exp(F.logsigmoid(z / self.tau) - z)


@dataclass(eq=False)
class PreferencePolicy(ScaledTask):
    """A policy over few answers, trained on ranked pairs and judged by its expected hidden reward.

    log pi(. | x) = log_softmax(log reference(. | x) + f(x)) with a network f that starts near 0, so that training starts at
    the reference. Data: `metaopt_tasks.data.preferences`, whose units make the loss about 1 for the reference and 0 at best.

    Attributes:
        hidden: widths of f; empty for a linear one.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        objective: the loss of a pair as a function of rho = log pi/reference of the chosen answer, minus the same of
            the rejected one.
    """

    hidden: tuple[int, ...] = ()
    activation: str = "tanh"
    objective: Objective = DPO()

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)

    def init(self, generator: Generator) -> Params:
        """LeCun or He normal weights by activation, a small head, zero biases."""
        tensors = self.train.tensors
        sizes = (tensors["input"].shape[1], *self.hidden, tensors["reference"].shape[1])
        return mlp_params(sizes, generator, ACTIVATIONS[self.activation][1])

    def log_policy(self, params: Params, inputs: Tensor, reference: Tensor) -> Tensor:
        """Questions [B, features] and the reference's log-probabilities [B, actions] -> the policy's."""
        return (reference + mlp(params, inputs, ACTIVATIONS[self.activation][0])).log_softmax(-1)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Minus the exact expected reward: a sum over all answers, no sampling."""
        policy = self.log_policy(params, batch["input"], batch["reference"]).exp()
        return -(policy * batch["reward"]).sum(-1).mean()

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The mean objective of the pairs; the hidden reward takes no part."""
        inputs = torch.cat([batch["input"], batch["rejected_input"]])
        reference = torch.cat([batch["reference"], batch["rejected_reference"]])
        ratios = self.log_policy(params, inputs, reference) - reference
        answers = torch.cat([batch["chosen"], batch["rejected"]])
        chosen, rejected = ratios.gather(1, answers[:, None]).squeeze(1).chunk(2)
        return self.objective(chosen - rejected).mean(), buffers

    def info(self) -> dict[str, ParamInfo]:
        """The first hidden layer is the input, the head the output."""
        roles = {"fc1.weight": "input", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def preference(
    name: str = "preference",
    data: str = "preferences_clean",
    objective: str | Objective = "dpo",
    beta: float = 0.5,
    hidden: Sequence[int] = (),
    activation: str = "tanh",
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
) -> PreferencePolicy:
    """A policy on a preference data source.

    Args:
        name: of the task.
        data: a registered source laid out as `metaopt_tasks.data.preferences.preferences`.
        objective: a registered objective with the tag ``preference``, or any function of rho [B] -> [B].
        beta: of a registered objective.
        hidden: widths of the policy's network.
        activation: of its hidden layers.
        batch_size: pairs per step.
        horizon: steps of a run.
        device: of the data.
    """
    splits = load(data, device)
    made = registry.create("objective", objective, beta=beta) if isinstance(objective, str) else objective
    return PreferencePolicy(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon,
        hidden=tuple(hidden), activation=activation, objective=made,
    )  # fmt: skip
