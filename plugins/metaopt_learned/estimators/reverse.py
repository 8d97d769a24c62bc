"""Reverse-mode gradients of unrolls, with boundary checkpointing.

``torch.utils.checkpoint`` raises inside ``torch.func`` transforms, so the two sweeps are written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.learned import Theta
from metaopt.meta.inner import InnerProblem
from metaopt_learned.estimators.episodes import Stretch, run_stretch


def unroll_gradient(
    inner: InnerProblem,
    thetas: Tensor,
    like: Theta,
    state: dict[str, Any],
    stretches: list[Stretch],
    weigh: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Run the stretches and differentiate a weighted sum of their losses.

    A first sweep records nothing and keeps the state at every boundary between stretches; the second goes backwards,
    repeats one stretch after the other with its graph and hands the gradient of its first state on. Memory: one state per
    stretch and the graph of the longest.

    Args:
        inner: what runs.
        thetas: [n, S, D]; a gradient for each of them, so that a diverged run spoils no other.
        like: theta, for names and shapes.
        state: [n, S, ...], taken as constant.
        stretches: the plan.
        weigh: losses [n, S, K] -> their weights, taken as constant.

    Returns:
        losses [n, S, K], the gradient [n, S, D], and the state after the last stretch.
    """
    boundaries, parts = [state], []
    with torch.no_grad():
        for stretch in stretches[:-1]:
            part, state = run_stretch(inner, thetas, like, state, stretch)
            boundaries.append(state)
            parts.append(part)
    gradient, weights, end, adjoints = torch.zeros_like(thetas), thetas.new_empty(0), state, list[Tensor]()
    for stretch in reversed(stretches):
        with torch.enable_grad():
            leaf = thetas.detach().requires_grad_()
            before = tree.map_tree(_leaf, boundaries.pop())
            part, after = run_stretch(inner, leaf, like, before, stretch)
        if not weights.numel():  # the last stretch: it was not run before
            parts.append(part.detach())
            weights, end = weigh(torch.cat(parts, 2)), tree.detach(after)
            adjoints = [torch.zeros_like(value) for value in _floating(after)]
        done, weights = weights[..., -stretch.steps :], weights[..., : -stretch.steps]
        outputs = zip([part, *_floating(after)], [done, *adjoints], strict=True)
        recorded = [(output, adjoint) for output, adjoint in outputs if output.requires_grad]
        found, *adjoints = torch.autograd.grad(
            [output for output, _ in recorded], [leaf, *_floating(before)], [adjoint for _, adjoint in recorded],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        gradient = gradient + found
    return torch.cat(parts, 2), gradient, end


def _floating(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in tree.leaves(state) if value.is_floating_point()]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value
