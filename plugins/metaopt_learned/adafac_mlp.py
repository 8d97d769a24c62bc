"""The factored-accumulator MLP optimizer (small_fc_lopt, AdafacMLPLOpt)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.perparameter import Decays, Features
from metaopt.space import option
from metaopt_learned.feature_sets import ADAFAC_BLOCKS, FACTORED_DECAYS, MOMENTUM_DECAYS, RMS_DECAYS
from metaopt_learned.timed_mlp import TimedMLP


class AdafacMLP(TimedMLP):
    r"""A small MLP that maps 39 features of each parameter to its step.

    Accumulators, without bias correction, with learned decays: three momenta :math:`m_k`, one second moment v, and
    three factored second moments (row means R_k, column means C_k; vectors keep the whole V_k). Features, in order:
    g, p, m_k, v, m_k r, r, factored g, R_k, C_k, R_k^{-1/2}, C_k^{-1/2}, factored m_k with :math:`r = (v+10^{-6})^{-1/2}`;
    each divided by its RMS over the tensor; then :math:`\tanh(t/\tau_j - 1)` for eleven time scales, t = 0 first.

    .. math::
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, c\, d\, e^{0.001 s}, \qquad
        (d, s) = \mathrm{MLP}_{39 \to H \to H \to 2}

    Metz et al., 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers"
    (https://arxiv.org/abs/2203.11860). ``step_scale`` c is 0.001 in learned_optimization and 0.01 in muLO and PyLO;
    PyLO's ELO is ``step_scale=1`` with lr 0.001, H = 32 and decays at their start (zero offsets).
    """

    layout: str = option(
        "torch", choices=("torch", "jax"), doc="which axis is the output one where sizes tie: the first, or the last"
    )
    nan_to_zero: ClassVar[bool] = False

    @cached_property
    def features(self) -> Features:
        """See the class."""
        return Features(
            ADAFAC_BLOCKS, len(MOMENTUM_DECAYS), len(RMS_DECAYS), len(FACTORED_DECAYS),
            layout=self.layout, nan_to_zero=self.nan_to_zero,
        )  # fmt: skip

    def init_theta(self, generator: Generator) -> Theta:
        """As in `TimedMLP`, with zero decay offsets."""
        offsets = {
            "momentum_decays": torch.zeros(len(MOMENTUM_DECAYS)),
            "rms_decays": torch.zeros(len(RMS_DECAYS)),
            "adafactor_decays": torch.zeros(len(FACTORED_DECAYS)),
        }
        return super().init_theta(generator) | offsets

    def decays(self, theta: Theta) -> Decays:
        """The learned ones."""
        return {
            "momentum": learned_decays(theta["momentum_decays"], MOMENTUM_DECAYS),
            "rms": learned_decays(theta["rms_decays"], RMS_DECAYS),
            "factored": learned_decays(theta["adafactor_decays"], FACTORED_DECAYS),
        }

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of learned_optimization."""
        return {name.removeprefix("nn/~/"): value for name, value in arrays.items()}


def learned_decays(offset: Tensor, initial: tuple[float, ...]) -> Tensor:
    """1 - (1 - initial) exp(10 offset), clipped to [0, 1]."""
    complement = torch.tensor([1.0 - d for d in initial], dtype=offset.dtype, device=offset.device)
    return (1 - complement * torch.exp(10 * offset)).clamp(0, 1)
