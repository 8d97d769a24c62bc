"""The kernels of CPUs: generated C++, where a compiler is found, and NumPy's BLAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metaopt.dense.cpp import dense_gradients, dense_unroll
from metaopt.dense.network import DenseNetwork
from metaopt.kernels import BlockwiseStep, Dtypes
from metaopt.matrix_cpu import newton_schulz
from metaopt.perparameter.cpp import fused_step, supports
from metaopt.perparameter.features import Features, Slots
from metaopt.perparameter.prepared import Prepared, Step
from metaopt.program.cpp import CppStep, compile_cpp
from metaopt.program.population import Population, PopulationStep
from metaopt.program.program import Program
from metaopt.replacing import Replacement
from metaopt.rule import Params, State


class CppKernels:
    """See `metaopt.kernels.Kernels`."""

    of_matrices: Mapping[str, Replacement] = {"newton_schulz": newton_schulz}

    def elementwise(self, program: Program, dtypes: Dtypes, out_of_place: bool = False) -> CppStep | None:
        """See `compile_cpp`."""
        return compile_cpp(program, *dtypes, out_of_place)

    def blockwise(
        self, program: Program, signed: Sequence[bool], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> BlockwiseStep | None:
        """None: torch operations read and write 8 bits, C++ steps what they stand for."""
        return None

    def population(self, population: Population, runs: Tensor, shapes: Sequence[Sequence[int]]) -> PopulationStep:
        """See `PopulationStep`."""
        return PopulationStep(population, runs, shapes)

    def reaches(self, features: Features, shape: Sequence[int], like: Tensor) -> bool:
        """See `supports`."""
        return supports(features, shape, like)

    def network_step(
        self, step: Step, prepared: Prepared, grads: Params, params: Params, state: State, *, in_place: bool = False
    ) -> tuple[Params, dict[str, Slots]] | None:
        """See `fused_step`."""
        return fused_step(step, prepared, grads, params, state, in_place=in_place)

    def dense_gradients(
        self, network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor
    ) -> tuple[Tensor, Params] | None:
        """See `metaopt.dense.cpp.dense_gradients`."""
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
        """See `metaopt.dense.cpp.dense_unroll`."""
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
        """None: not in C++."""
        return None
