"""The contract of an objective: a pure loss with one value per example, declared like a rule.

A training problem computes the inputs and averages what comes back; what is between is the objective, which a plugin registers
(`metaopt.hookspecs.metaopt_objectives`) and a search may discover.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from metaopt.rule import Declared, HyperValues

if TYPE_CHECKING:
    from metaopt.program.program import Program

Kind = Literal["preference", "classification", "regression", "reweighting", "rl"]

LOG_PROBABILITIES = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)
"""Log-probabilities of whole answers (summed over tokens), in nats, under the policy and under its reference."""

INPUTS: Mapping[Kind, tuple[str, ...]] = {
    "preference": (*LOG_PROBABILITIES, "rho", "chosen_lengths", "rejected_lengths", "chosen_scores", "rejected_scores"),
    "classification": ("logits", "labels"),
    "regression": ("prediction", "target"),
    "reweighting": ("losses",),
    "rl": ("ratio", "advantage"),
}
"""Kind -> what its objectives may read.

- ``preference``: all [B]; `LOG_PROBABILITIES`, and what follows from them: rho = (policy - reference of the chosen answer) -
  (policy - reference of the rejected one); lengths in tokens (at least 1), and scores, the chosen answer's higher.
- ``classification``: ``logits`` [B, C] and ``labels`` int64 [B].
- ``regression``: ``prediction`` and ``target`` of one shape; the loss has one value per entry.
- ``reweighting``: ``losses`` [B]; what comes back are weights, whose mean is about 1 or less, to be used as constants.
- ``rl``: ``ratio`` [B] = pi(a|s) / pi_old(a|s) above 0, and ``advantage`` [B].
"""

DIFFERENTIATED: Mapping[Kind, tuple[str, ...]] = {
    "preference": LOG_PROBABILITIES[:2],
    "classification": ("logits",),
    "regression": ("prediction",),
    "reweighting": (),
    "rl": ("ratio",),
}
"""Kind -> the inputs through which the loss reaches the model."""


class Objective(Declared, ABC):
    """A loss per example; it mutates nothing, reads no globals and averages nothing.

    Hyperparameters and options are fields, as a rule's (`metaopt.space.hyper`). bf16 and fp16 inputs are computed with in
    float32, which the loss then has; gradients on their way back saturate at the inputs' largest finite number.

    Attributes:
        kind: which inputs there are: a key of `INPUTS`.
        inputs: those of them that `loss` takes, in its order.
        batch_dependent: whether an example's loss depends on the others, so that micro-batches change it.
    """

    kind: ClassVar[Kind]
    inputs: ClassVar[tuple[str, ...]]
    batch_dependent: ClassVar[bool] = False

    @abstractmethod
    def loss(self, *inputs: Any, **hp: Any) -> Any:
        """``(*inputs, **hyperparameters) -> loss`` [B], in float32 or float64; vmap-safe.

        Hyperparameters are arguments, so that they can differ between copies and be differentiated; options may be read from
        ``self``. A text of the functions that `ElementwiseRule` may use has a `program`.
        """

    def __call__(self, inputs: Mapping[str, Tensor], hp: HyperValues | None = None) -> Tensor:
        """The loss of each example.

        Args:
            inputs: at least the objective's own, by name; see `INPUTS` for shapes.
            hp: hyperparameters, as floats or tensors; without them, the objective's own.

        Raises:
            ValueError: an input is missing, or shapes do not fit.
        """
        made = "rho" in self.inputs and "rho" not in inputs
        needed = [name for name in self.inputs if not made or name != "rho"] + [*LOG_PROBABILITIES] * made
        missing = [name for name in needed if name not in inputs]
        if missing:
            raise ValueError(
                f"{self.label()} needs {', '.join(needed)}; the inputs lack {', '.join(missing)}, "
                f"and have {', '.join(inputs) or 'none'}"
            )
        given = {name: inputs[name] for name in needed}
        self._require_shapes(given)
        given = {name: _widened(x) for name, x in given.items()}
        if made:
            chosen, rejected, reference_chosen, reference_rejected = (given[name] for name in LOG_PROBABILITIES)
            given["rho"] = (chosen - reference_chosen) - (rejected - reference_rejected)
        return self.loss(*(given[name] for name in self.inputs), **(self.hp if hp is None else hp))

    def _require_shapes(self, inputs: Mapping[str, Tensor]) -> None:
        shapes = [x.shape[:1] if name == "logits" else x.shape for name, x in inputs.items()]
        if any(shape != shapes[0] for shape in shapes):  # broadcast, [B] and [B, 1] would make B * B losses
            found = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
            raise ValueError(f"the inputs of {self.label()} must have one value per example, got {found}")

    @cached_property
    def program(self) -> Program:
        """What `loss` was traced to: the same loss as data.

        Raises:
            TraceError: its text leaves the expression language.
        """
        from metaopt.program.trace import trace_objective

        return trace_objective(self)


class _Widen(torch.autograd.Function):
    """To float32; the gradient comes back in the input's dtype, without infinities that only the narrower range made."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        largest = torch.finfo(ctx.dtype).max
        return grad.clamp(-largest, largest).to(ctx.dtype)


def _widened(x: Tensor) -> Tensor:
    return _Widen.apply(x) if x.dtype in (torch.bfloat16, torch.float16) else x


# -- probes --------------------------------------------------------------------------------------------------------------

PROBES = (0.0, *(sign * 10.0**k for k in range(-3, 5) for sign in (1, -1)))
"""Logits, log-ratios, errors and advantages where a loss must be finite, with a finite gradient: 0, +-1e-3, ..., +-1e4."""


def probes(kind: Kind) -> list[dict[str, Tensor]]:
    """Inputs of one example each, float64, that take `PROBES` one after the other: ordinary values meet no overflow.

    The first ones of a preference are of rho = -1e4 ... 1e4 through the chosen answer, then through the rejected one.
    """
    return [
        {
            name: torch.tensor([value], dtype=torch.int64 if name == "labels" else torch.float64)
            for name, value in p.items()
        }
        for p in _probes(kind)
    ]


def _probes(kind: Kind) -> list[dict[str, Any]]:
    if kind == "preference":
        same = dict.fromkeys(LOG_PROBABILITIES, 0.0)
        rest = {"chosen_lengths": 1.0, "rejected_lengths": 1.0, "chosen_scores": 1.0, "rejected_scores": 0.0}
        # a log-probability is never above 0: the reference's falls where the ratio rises
        of = {True: "policy", False: "reference"}
        return [
            {**same, f"{of[(x < 0) == (answer == 'chosen')]}_{answer}_logps": -abs(x), **rest}
            for answer in ("chosen", "rejected")
            for x in sorted(PROBES)
        ]
    if kind == "classification":
        return [{"logits": [x, 0.0, 0.0], "labels": label} for x in PROBES for label in (0, 1)]
    if kind == "regression":
        return [{"prediction": x, "target": target} for x in PROBES for target in (0.0, x)]
    if kind == "reweighting":
        return [{"losses": abs(x)} for x in PROBES]
    ratios = [{"ratio": abs(x), "advantage": sign} for x in PROBES for sign in (1.0, -1.0)]
    return ratios + [{"ratio": ratio, "advantage": x} for x in PROBES for ratio in (0.5, 1.0, 2.0)]


def faults(
    objective: Objective, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> list[str]:
    """What is wrong with an objective on `probes`: losses or gradients that are not finite, a loss of another shape.

    Returns:
        A sentence for each fault; none for a loss that is stable.
    """
    found = []
    for dtype in dtypes:
        for probe in probes(objective.kind):
            inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in probe.items()}
            for name in DIFFERENTIATED[objective.kind]:
                inputs[name].requires_grad_()
            loss = objective(inputs)
            at = ", ".join(f"{name} {x[0].tolist()}" for name, x in probe.items())
            if loss.shape != (1,):
                found.append(f"the loss of one example has shape {list(loss.shape)}, not [1]")
                return found
            if not torch.isfinite(loss).all():
                found.append(f"the loss is {loss.item():g} at {at} in {dtype}")
            if loss.requires_grad:
                loss.sum().backward()
            for name in DIFFERENTIATED[objective.kind]:
                grad = inputs[name].grad
                if grad is not None and not torch.isfinite(grad).all():
                    found.append(f"the gradient by {name} is {grad.flatten().tolist()} at {at} in {dtype}")
    return found
