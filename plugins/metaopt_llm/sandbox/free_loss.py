"""A sandboxed candidate as a loss: autograd sees numbers and gradients, the candidate sees copies of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.objective import Kind, Objective
from metaopt_llm.sandbox.sandbox import Candidate


class FreeLoss(Objective):
    """The loss of a candidate: differentiable once, vmap-safe.

    Each call, and each backward pass, is one round trip to the candidate; copies under vmap take one each.

    Attributes:
        candidate: what runs (`metaopt_llm.sandbox.Sandbox.candidate`).
        of: the kind.
    """

    candidate: Candidate
    of: Kind = "preference"

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """`of`."""
        return self.of

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the candidate was made with."""
        return self.candidate.tensors

    @property
    def batch_dependent(self) -> bool:  # type: ignore[override]
        """As far as anybody knows."""
        return True

    def loss(self, *inputs: Tensor) -> Tensor:
        """``(*inputs) -> loss`` [B]; all inputs are [B].

        Raises:
            CandidateError: the candidate failed.
        """
        return _Loss.apply(self.candidate, *inputs)


def _on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().cpu() for x in tensors]


def _copy_by_copy(
    function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> list[Any]:
    """A function of (candidate, *tensors) for each copy of a vmap."""
    return [
        function(*(x if d is None else x.select(d, k) for x, d in zip(args, in_dims, strict=True)))
        for k in range(info.batch_size)
    ]


class _Loss(torch.autograd.Function):
    """(candidate, *inputs) -> losses."""

    @staticmethod
    def forward(candidate: Candidate, *inputs: Tensor) -> Tensor:
        losses, _ = candidate.evaluate(_on_cpu(inputs))
        return losses.to(inputs[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.candidate = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> Any:
        return None, *_Gradients.apply(ctx.candidate, weights, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.stack(_copy_by_copy(_Loss.apply, info, in_dims, args)), 0


class _Gradients(torch.autograd.Function):
    """(candidate, weights, *inputs) -> a gradient for each input."""

    @staticmethod
    def forward(candidate: Candidate, weights: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        _, gradients = candidate.evaluate(_on_cpu(inputs), weights.detach().cpu())
        return tuple(gradient.to(weights.device) for gradient in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a loss in free Python has no second derivatives; write it in the language instead")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        columns = zip(*_copy_by_copy(_Gradients.apply, info, in_dims, args), strict=True)
        stacked = tuple(torch.stack(column) for column in columns)
        return stacked, (0,) * len(stacked)
