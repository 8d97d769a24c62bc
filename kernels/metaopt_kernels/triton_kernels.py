"""The kernels of NVIDIA GPUs, in Triton."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metaopt.dense.network import DenseNetwork
from metaopt.kernels import Dtypes
from metaopt.perparameter.features import Features, Slots
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.program.encoding import reads_matrices
from metaopt.program.population import Population
from metaopt.program.program import Program
from metaopt.replacing import Replacement
from metaopt.rule import Params, State
from metaopt_kernels.blockwise import BlockwiseStep, blockwise_step
from metaopt_kernels.dense import dense_gradients
from metaopt_kernels.dense_unroll import dense_unroll
from metaopt_kernels.elementwise import TritonStep, elementwise
from metaopt_kernels.network_step import fused_step, supports
from metaopt_kernels.network_unroll import network_unroll
from metaopt_kernels.newton_schulz import newton_schulz
from metaopt_kernels.population import TritonPopulationStep


class TritonKernels:
    """See `metaopt.kernels.Kernels`."""

    of_matrices: Mapping[str, Replacement] = {"newton_schulz": newton_schulz}

    def elementwise(self, program: Program, dtypes: Dtypes, out_of_place: bool = False) -> TritonStep | None:
        """See `metaopt_kernels.elementwise`; one step does both."""
        return elementwise(program, dtypes)

    def blockwise(
        self, program: Program, signed: Sequence[bool], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> BlockwiseStep | None:
        """See `metaopt_kernels.blockwise.blockwise_step`."""
        return blockwise_step(program, signed, dtypes)

    def population(
        self, population: Population, runs: Tensor, shapes: Sequence[Sequence[int]]
    ) -> TritonPopulationStep | None:
        """See `metaopt_kernels.population`; None where a run's program has matrix operations."""
        if reads_matrices(population.kernel, runs).any():
            return None
        return TritonPopulationStep(population, runs, [*map(math.prod, shapes)])

    def reaches(self, features: Features, shape: Sequence[int], like: Tensor) -> bool:
        """See `metaopt_kernels.network_step.supports`."""
        return supports(features, shape, like)

    def network_step(
        self, step: Step, prepared: Prepared, grads: Params, params: Params, state: State, *, in_place: bool = False
    ) -> tuple[Params, dict[str, Slots]] | None:
        """See `metaopt_kernels.network_step.fused_step`."""
        return fused_step(step, prepared, grads, params, state, in_place=in_place)

    def dense_gradients(
        self, network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor
    ) -> tuple[Tensor, Params] | None:
        """See `metaopt_kernels.dense.dense_gradients`."""
        return dense_gradients(network, params, inputs, target)

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
        """See `metaopt_kernels.dense_unroll.dense_unroll`."""
        return dense_unroll(network, program, coefficients, params, state, inputs, target, indices)

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
        """See `metaopt_kernels.network_unroll.network_unroll`."""
        return network_unroll(network, step, prepare, params, state, inputs, target, indices)
