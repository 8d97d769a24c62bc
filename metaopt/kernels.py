"""What one kind of device can do in fewer passes over memory than torch operations: the contract of a plugin's kernels.

Every method may give None: not on this device, not for these dtypes, shapes or rules. Torch operations run then, and give
the same numbers within rounding; they are the reference that each kernel is tested against.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from metaopt import registry
from metaopt.dense.network import DenseNetwork
from metaopt.eight_bit import Blockwise
from metaopt.perparameter.features import Features, Slots
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.program.population import Population
from metaopt.program.program import Program
from metaopt.replacing import Replacement
from metaopt.rule import Params, State

Columns = Sequence[Sequence[Tensor]]
"""Per name in ``program.tensors`` a list of tensors, one per parameter."""

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Of parameters, gradients and slots."""


class ElementwiseStep(Protocol):
    """One step of a `Program` over many tensors."""

    def fits(self, columns: Columns) -> bool:
        """Whether the step may run in place on ``columns``."""

    def __call__(self, columns: Columns, coefficients: Mapping[str, float]) -> None:
        """Update parameters and slots in place; gradients are only read."""

    def copies(self, columns: Columns, coefficients: Mapping[str, float | Tensor]) -> list[list[Tensor]]:
        """New parameters and slots of contiguous tensors [K, ...]; a coefficient is a number or a float64 tensor [K]."""


class BlockwiseStep(Protocol):
    """One step of a `Program` over many tensors whose slots are kept in 8 bits."""

    def fits(self, params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Sequence[Blockwise]]) -> bool:
        """Whether the step may run in place on these; ``slots``: for each slot of the program one per parameter."""

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        slots: Sequence[Sequence[Blockwise]],
        coefficients: Mapping[str, float],
    ) -> None:
        """Update parameters and slots in place; gradients are only read."""


class RunsStep(Protocol):
    """One step of R runs of different programs: see `metaopt.program.population.PopulationStep`."""

    def __call__(self, params: Tensor, grads: Tensor, slots: Tensor, numbers: Tensor) -> None:
        """Update parameters [R, P] and slots [S, R, P] in place."""


class Kernels(Protocol):
    """The fused passes of one kind of device, registered under its name (``cpu``, ``cuda``).

    Attributes:
        of_matrices: what may replace a function of `metaopt.matrix`, by its name: see `metaopt.replacing`.
    """

    of_matrices: Mapping[str, Replacement]

    def elementwise(self, program: Program, dtypes: Dtypes, out_of_place: bool = False) -> ElementwiseStep | None:
        """The step of a program; tensors are stored in ``dtypes`` and computed in float32, or float64 if parameters are.

        ``out_of_place``: the step's `ElementwiseStep.copies` will be called, else the step itself.
        """

    def blockwise(
        self, program: Program, signed: Sequence[bool], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> BlockwiseStep | None:
        """The step of a program whose slots are kept in 8 bits (`metaopt.eight_bit`) and computed in float32.

        Args:
            program: what to run.
            signed: for each slot, whether it may be negative.
            dtypes: of parameters and gradients.
        """

    def population(self, population: Population, runs: Tensor, shapes: Sequence[Sequence[int]]) -> RunsStep | None:
        """The step of R runs of programs of a population.

        Args:
            population: the programs.
            runs: int64 [R], the program of each run.
            shapes: of the tensors that lie side by side in each run's row.
        """

    def reaches(self, features: Features, shape: Sequence[int], like: Tensor) -> bool:
        """Whether `network_step` can step a parameter of this shape, dtype and device."""

    def network_step(
        self,
        step: Step,
        prepared: Prepared,
        grads: Params,
        params: Params,
        state: State,
        *,
        in_place: bool = False,
    ) -> tuple[Params, dict[str, Slots]] | None:
        """One step of K copies of a learned rule with a per-parameter network: see `metaopt.perparameter.cpp.fused_step`."""

    def dense_gradients(
        self, network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor
    ) -> tuple[Tensor, Params] | None:
        """Losses [K] and gradients of K copies of a dense network on a batch of their own.

        Args:
            network: layers, activation and loss.
            params: [K, *shape] each.
            inputs: [K, B, D].
            target: [K, B] int64 classes, or [K, B, outputs].
        """

    def dense_unroll(
        self,
        network: DenseNetwork,
        program: Program,
        coefficients: Mapping[str, Tensor],
        params: Params,
        state: Mapping[str, Mapping[str, Tensor]],
        inputs: Tensor,
        target: Tensor,
        indices: Tensor,
    ) -> tuple[Tensor, Params, State, Tensor] | None:
        """T inner steps of K copies without a return to Python.

        Args:
            network: layers, activation and loss.
            program: the elementwise rule.
            coefficients: per name in ``program.coefficients``, float64 [K, T].
            params: [K, *shape] each; not changed.
            state: the slots of each parameter, [K, *shape] each; not changed.
            inputs: the task's examples [N, D], shared by all copies.
            target: [N] int64 or [N, outputs].
            indices: [K, T, B] rows of them.

        Returns:
            Losses [K, T], new parameters, new slots, and [K] whether the copy stayed finite: what a copy that did not has
            become is undefined, and its window must be run again with a look at every step.
        """

    def network_unroll(
        self,
        network: DenseNetwork,
        step: Step,
        prepare: Callable[[], Prepared],
        params: Params,
        state: Mapping[str, Slots],
        inputs: Tensor,
        target: Tensor,
        indices: Tensor,
    ) -> tuple[Tensor, Params, dict[str, Slots], Tensor] | None:
        """`dense_unroll` under a learned rule with a per-parameter network.

        Args:
            network: layers, activation and loss.
            step: of which rule.
            prepare: makes what every step needs, each tensor of it with leading dimensions T and K, of any strides; called only
                by a kernel that takes the rest.
            params: [K, *shape] each; not changed.
            state: the accumulators of each parameter, [K, n, ...]; not changed. Other slots are not read.
            inputs: the task's examples [N, D], shared by all copies.
            target: [N] int64 or [N, outputs].
            indices: [K, T, B] rows of them.

        Returns:
            As `dense_unroll`, with new accumulators for slots.
        """


@functools.cache
def kernels_of(device: str) -> Kernels | None:
    """The kernels of a kind of device (``torch.device.type``); None, and one logged line, where they cannot be loaded."""
    if device not in registry.specs("kernel"):
        return None
    try:
        made: Kernels = registry.create("kernel", device)
    except registry.RegistryError as error:
        logging.getLogger("metaopt").info("torch operations on %s: %s", device, error)
        return None
    return made
