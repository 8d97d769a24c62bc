"""The plain MLP optimizer (MLPLOpt, LOLv2)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from metaopt.learned import Theta
from metaopt.perparameter import Decays, Features
from metaopt.space import option
from metaopt_learned.feature_sets import constant
from metaopt_learned.timed_mlp import TimedMLP

MOMENTUM_DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)


class MLPLOpt(TimedMLP):
    r"""An MLP that maps gradient, parameter and six momenta to a step.

    Momenta :math:`m_k` with decays 0.1, 0.5, 0.9, 0.99, 0.999 and 0.9999, without bias correction. Features, in order:
    g, p, m_k, each divided by its RMS over the tensor; then :math:`\tanh(t/\tau_j - 1)` for eleven time scales, t = 0 first.

    .. math::
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, c\, d\, e^{0.001 s}, \qquad
        (d, s) = \mathrm{MLP}_{19 \to H \to H \to 2}

    MLPLOpt of learned_optimization (https://github.com/google/learned_optimization), after Metz et al., 2019
    (https://arxiv.org/abs/1810.10180).
    """

    hidden: int = option(32, low=1, doc="width H of both hidden layers")

    @cached_property
    def features(self) -> Features:
        """See the class."""
        return Features(("g", "p", "m"), len(MOMENTUM_DECAYS), 0, 0)

    def decays(self, theta: Theta) -> Decays:
        """Those of the momenta; see the class."""
        return {"momentum": constant(MOMENTUM_DECAYS, theta["w0"])}

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of learned_optimization."""
        return {f"{kind}{i}": arrays[f"mlp/~/linear_{i}/{kind}"] for i in range(3) for kind in "wb"}
