"""Preference optimisation with small policies: what losses for learning from ranked pairs are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt import registry
from metaopt.objective import LOG_PROBABILITIES, Objective
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.load import load
from metaopt_tasks.layers import ACTIVATIONS, mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

_LENGTHS = ("chosen_lengths", "rejected_lengths")


@dataclass(eq=False)
class PreferencePolicy(ScaledTask):
    """A policy over few answers, trained on ranked pairs and judged by its expected hidden reward.

    log pi(. | x) = log_softmax(log reference(. | x) + f(x)) with a network f that starts near 0, so that training starts at
    the reference. Data: `metaopt_tasks.data.preferences`, whose units make the loss about 1 for the reference and 0 at best.

    Attributes:
        hidden: widths of f; empty for a linear one.
        activation: a name in `metaopt_tasks.layers.ACTIVATIONS`.
        objective: the loss of a pair, of kind ``preference``. Answers are one token long; scores it may not read.
    """

    hidden: tuple[int, ...] = ()
    activation: str = "tanh"
    objective: Objective = field(kw_only=True)

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        unknown = set(self.objective.inputs) - {*LOG_PROBABILITIES, "rho", *_LENGTHS}
        if unknown:
            raise ValueError(
                f"{self.objective.label()} reads {', '.join(sorted(unknown))}, which this task has not; it has "
                f"{', '.join([*LOG_PROBABILITIES, *_LENGTHS])}"
            )

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

    def win_rate(self, params: Params, batch: Batch) -> Tensor:
        """How often the policy's answer has a higher hidden reward than the reference's to the same question, in [0, 1]; equal
        ones count half. Exact: a sum over all pairs of answers."""
        policy = self.log_policy(params, batch["input"], batch["reference"]).exp()
        ahead = batch["reward"][:, :, None] - batch["reward"][:, None, :]
        return torch.einsum("bi,bij,bj->b", policy, 0.5 * (1 + torch.sign(ahead)), batch["reference"].exp()).mean()

    def kl(self, params: Params, batch: Batch) -> Tensor:
        """KL(policy || reference) in nats, exact, averaged over questions: what the reward was paid with."""
        log_policy = self.log_policy(params, batch["input"], batch["reference"])
        return (log_policy.exp() * (log_policy - batch["reference"])).sum(-1).mean()

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The mean objective of the pairs; the hidden reward takes no part."""
        return self.objective(self.pairs(params, batch)).mean(), buffers

    def pairs(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """What the objective is of, [B] each: log-probabilities of both answers, and lengths of 1."""
        inputs = torch.cat([batch["input"], batch["rejected_input"]])
        reference = torch.cat([batch["reference"], batch["rejected_reference"]])
        answers = torch.cat([batch["chosen"], batch["rejected"]])[:, None]
        tables = self.log_policy(params, inputs, reference), reference
        columns = [column for table in tables for column in table.gather(1, answers).squeeze(1).chunk(2)]
        lengths = dict.fromkeys(_LENGTHS, torch.ones_like(columns[0]))
        return dict(zip(LOG_PROBABILITIES, columns, strict=True)) | lengths

    def info(self) -> dict[str, ParamInfo]:
        """The first hidden layer is the input, the head the output."""
        roles = {"fc1.weight": "input", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def preference(
    name: str = "preference",
    data: str = "preferences_clean",
    objective: str | Objective = "dpo",
    beta: float | None = 0.5,
    hidden: Sequence[int] = (),
    activation: str = "tanh",
    batch_size: int = 64,
    horizon: int = 200,
    device: Any = "cpu",
    **source: Any,
) -> PreferencePolicy:
    """A policy on a preference data source.

    Args:
        name: of the task.
        data: a registered source laid out as `metaopt_tasks.data.preferences.preferences`.
        objective: a name of ``metaopt list objectives`` with the tag ``preference``, ``file.py:Name``, or an `Objective`.
        beta: of an objective that is given by name; None: its own default.
        hidden: widths of the policy's network.
        activation: of its hidden layers.
        batch_size: pairs per step.
        horizon: steps of a run.
        device: of the data.
        **source: arguments of the data source, such as ``flips`` or ``noise``.
    """
    splits = load(data, device, **source)
    own = {} if beta is None else {"beta": beta}
    made = registry.create("objective", objective, **own) if isinstance(objective, str) else objective
    return PreferencePolicy(
        name, splits["train"], splits["valid"], splits["test"], batch_size, horizon,
        hidden=tuple(hidden), activation=activation, objective=made,
    )  # fmt: skip
