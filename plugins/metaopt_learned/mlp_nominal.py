"""The factored-accumulator MLP optimizer on top of a hand-designed step (MLPNomLOpt)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from metaopt.perparameter import Slots
from metaopt.space import option
from metaopt_learned.adafac_mlp import AdafacMLP


class MLPNominal(AdafacMLP):
    r"""`AdafacMLP` with a nominal term: a momentum or Adam step whose size, like the decay's, the network controls.

    .. math::
        p \leftarrow (1 - \eta\lambda\, e^{k_\lambda s_\lambda})\, p - \eta\, (c\, d\, e^{k s} + n\, e^{k_n s_n}\, u),
        \qquad (d, s, s_n, s_\lambda) = \mathrm{MLP}_{39 \to H \to H \to 4}

    u, from the momenta :math:`m_k` and the second moment v of the features: the mean of all :math:`m_k r` (``adam_aggmo``)
    or the slowest (``adam``), with :math:`r = (v + 10^{-6})^{-1/2}`; or the same of :math:`m_k` (``aggmo``, ``momentum``).
    n = ``nominal_scale``, 0 by default as in the original. Without ``control_nominal`` :math:`s_n = 1`, without
    ``control_decay`` :math:`s_\lambda = 0`. MLPNomLOpt of learned_optimization
    (https://github.com/google/learned_optimization); Metz et al., 2022 (https://arxiv.org/abs/2203.11860).
    """

    nominal: str = option("adam_aggmo", choices=("adam_aggmo", "adam", "aggmo", "momentum"), doc="the term u")
    nominal_scale: float = option(0.0, doc="constant n of the nominal term")
    control_nominal: bool = option(False, choices=(False, True), doc="scale u by the network's third output")
    control_decay: bool = option(False, choices=(False, True), doc="scale weight_decay by the network's fourth output")
    nominal_magnitude_scale: float = option(0.001, doc="constant k_n in the exponent")
    decay_magnitude_scale: float = option(0.001, doc="constant k_lambda in the exponent")
    mean_magnitude: bool = option(False, choices=(False, True), doc="s is its mean over the tensor")
    mean_nominal_magnitude: bool = option(False, choices=(False, True), doc="s_n is its mean over the tensor")
    rescale: bool = option(False, choices=(False, True), doc="multiply d by r")
    outputs: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nominal_scale and not self.step_scale:
            raise ValueError(
                "step_scale must not be 0 with a nominal term, which is scaled relative to it; give a tiny one"
            )

    def finish(self, outputs: Tensor, param: Tensor, slots: Slots, scale: Tensor, keep: Tensor) -> Tensor:
        """See the class."""
        direction, s, s_nominal, s_decay = outputs
        r = torch.rsqrt(slots["rms"][0] + self.features.rms_eps)
        s = s.mean() if self.mean_magnitude else s
        step = direction * torch.exp(self.magnitude_scale * s) * (r if self.rescale else 1)
        if self.nominal_scale:
            momentum = slots["momentum"].mean(0) if "aggmo" in self.nominal else slots["momentum"][-1]
            nominal = momentum * r if "adam" in self.nominal else momentum
            s_nominal = s_nominal.mean() if self.mean_nominal_magnitude else s_nominal
            s_nominal = s_nominal if self.control_nominal else torch.ones_like(s_nominal)
            size = self.nominal_scale / self.step_scale * torch.exp(self.nominal_magnitude_scale * s_nominal)
            step = step + size * nominal
        if self.control_decay:
            keep = 1 - (1 - keep) * torch.exp(self.decay_magnitude_scale * s_decay)
        return keep * param - scale * step
