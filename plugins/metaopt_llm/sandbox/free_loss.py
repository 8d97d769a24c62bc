"""A sandboxed candidate as a loss: autograd sees numbers and gradients, the candidate sees copies of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt_llm.sandbox.sandbox import Candidate


class FreeLoss:
    """``loss(inputs) -> [B]``: differentiable once, vmap-safe; called as objectives are.

    Each call, and each backward pass, is one round trip to the candidate, in float64 for float64 inputs and in float32 for
    others. Copies under vmap take one each.

    Args:
        candidate: what runs (`Sandbox.candidate`).
        tensors: the names that it was made with.
    """

    def __init__(self, candidate: Candidate, tensors: Sequence[str]) -> None:
        self._candidate = candidate
        self._tensors = tuple(tensors)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of each example.

        Args:
            inputs: at least the tensors that the candidate was made with, all of one shape [B].

        Raises:
            ValueError: an input is missing, or shapes differ.
            CandidateError: the candidate failed.
        """
        missing = [name for name in self._tensors if name not in inputs]
        if missing:
            raise ValueError(f"the loss needs {', '.join(self._tensors)}; the inputs lack {', '.join(missing)}")
        given = [inputs[name] for name in self._tensors]
        if any(x.dim() != 1 or x.shape != given[0].shape for x in given):
            raise ValueError(f"the inputs must have one value per example, got {[list(x.shape) for x in given]}")
        wide = torch.float64 if all(x.dtype == torch.float64 for x in given) else torch.float32
        return _Loss.apply(self._candidate, *(x.to(wide) for x in given))


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
