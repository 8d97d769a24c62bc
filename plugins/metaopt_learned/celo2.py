"""Celo2: a small MLP without schedule or time, whose direction is normalised or orthogonalised."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.matrix import newton_schulz
from metaopt.perparameter import (
    Features,
    PerParameterRule,
    Prepared,
    Slots,
    norm_axes,
    normalised,
    random_layers,
)
from metaopt.rule import Context, ElementwiseRule, HyperValues, ParamInfo, Params, State
from metaopt.space import hyper, learning_rate, option
from metaopt_learned.feature_sets import (
    FACTORED_DECAYS,
    MOMENTUM_DECAYS,
    VELO_BLOCKS,
    VELO_VECTOR_BLOCKS,
    constant_decays,
)
from metaopt_learned.timed_mlp import layers_of, named, scale_and_keep

RMS_DECAYS = (0.95,)
OUTPUTS = 3
NORM_EPS = 1e-9
NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ_EPS = 5, 1e-8


class Celo2Base(PerParameterRule):
    r"""An MLP that maps 30 features of each parameter to a direction, which is then normalised: the step has RMS eta.

    Features, in order, with three momenta :math:`m_k`, a second moment v of decay 0.95, :math:`r = (v + 10^{-8})^{-1/2}` and
    three factored second moments R_k, C_k: g, g clipped to 0.1, p, m_k, v, m_k r, r, factored g, g r (vectors have only
    these), R_k, C_k, R_k^{-1/2}, C_k^{-1/2}, factored m_k. Each is divided by its RMS over its matrix (outputs x inputs; each
    position of a kernel by itself), gradients are clipped to 1000.

    .. math::
        u = d\, e^{k s}, \quad (d, s, \cdot) = \mathrm{MLP}_{30 \to H \to H \to 3}(\mathrm{features}), \qquad
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, u / \mathrm{rms}(u)

    with k = ``magnitude_scale``, 0 by default: the second output is then dead, as the third always is. With ``param_scale``
    u is multiplied by the parameter's RMS first. Celo2Base of celo (https://github.com/amoudgl/celo); Moudgil et al.
    """

    prepares_ahead = True
    lr: float = learning_rate(1e-3, search=(1e-4, 1e-2))
    weight_decay: float = hyper(0.0, 0.0, scale="log", search=(1e-4, 1.0), doc="decoupled, times lr")
    hidden: int = option(8, low=1, doc="width H of both hidden layers")
    magnitude_scale: float = option(0.0, doc="constant k in the exponent")
    param_scale: bool = option(False, choices=(False, True), doc="multiply u by the parameter's RMS")
    bias_correction: bool = option(False, choices=(False, True), doc="divide accumulators by 1 - beta^t")
    layout: str = option("torch", choices=("torch", "jax"), doc="where outputs and inputs are: first, or last")

    @cached_property
    def features(self) -> Features:
        """See the class."""
        return self._features(norm="matrix")

    def _features(self, norm: str) -> Features:
        return Features(
            VELO_BLOCKS, len(MOMENTUM_DECAYS), len(RMS_DECAYS), len(FACTORED_DECAYS), clip=1000.0, rms_eps=1e-8,
            norm_eps=NORM_EPS, norm=norm, layout=self.layout, vector_blocks=len(VELO_VECTOR_BLOCKS),
            bias_correction=self.bias_correction,
        )  # fmt: skip

    @property
    def magnitude(self) -> float | None:
        """The constant in the exponent, if there is one."""
        return self.magnitude_scale or None

    @property
    def direction_eps(self) -> float | None:
        """That of the norm, if no more is done to the direction."""
        own = type(self)
        changed = own.shaped is not Celo2Base.shaped or own.finish is not Celo2Base.finish
        return None if changed or self.param_scale else NORM_EPS

    def init_theta(self, generator: Generator) -> Theta:
        """Truncated normal weights of variance 1 / fan-in, zero biases."""
        return named(random_layers((self.features.count((1, 1)), self.hidden, self.hidden, OUTPUTS), generator))

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """One network for matrices; vectors have its first inputs only. Outputs that nothing reads are left out."""
        (weight, bias), middle, (last, last_bias) = layers_of(theta)
        used = 2 if self.magnitude else 1
        rest = (middle, (last[:, :used], last_bias[:used]))
        of_count = {count: ((weight[:count], bias), *rest) for count in map(self.features.count, [(1,), (1, 1)])}
        layers = {name: of_count[self.features.count(tuple(param.shape))] for name, param in params.items()}
        scale, keep = scale_and_keep(hp, params, weight)
        return Prepared(constant_decays(weight, RMS_DECAYS), layers, scale, keep, {})

    def finish(self, outputs: Tensor, param: Tensor, slots: Slots, scale: Tensor, keep: Tensor) -> Tensor:
        """See the class."""
        direction = self.direction(outputs)
        if self.param_scale:
            direction = direction * torch.sqrt((param * param).mean() + 1e-9)
        direction = self.shaped(direction).unsqueeze(0)
        (direction,) = normalised(direction, norm_axes(self.features, tuple(param.shape)), NORM_EPS)
        return keep * param - scale * direction

    def shaped(self, direction: Tensor) -> Tensor:
        """What becomes of the direction before it is normalised."""
        return direction

    @staticmethod
    def theta_from_original(arrays: Mapping[str, Tensor]) -> Theta:
        """Theta from the flat names of celo, where the first layer is split by blocks of features."""
        found = {name.removeprefix("ff_mod_stack/~/"): value for name, value in arrays.items()}
        blocks = sorted((name for name in found if name.startswith("w0__")), key=lambda name: int(name[4:]))
        return {"w0": torch.cat([found.pop(name) for name in blocks]), **found}


class Celo2(Celo2Base):
    r"""`Celo2Base` with an orthogonalised direction; AdamW on vectors, scalars and embeddings.

    .. math::
        u = \mathrm{NS}_5(d\, e^{k s}) \text{ per matrix (outputs x inputs)}, \qquad
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, u / \mathrm{rms}(u)

    with NS `newton_schulz`, of each position of a kernel by itself. The rest, with a = ``adam_lr_ratio`` and without bias
    correction unless ``adam_bias_correction``:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \quad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \quad
        p \leftarrow (1 - a\eta\lambda)\, p - a\eta\, m / \sqrt{v + \epsilon}

    Celo2 of celo (https://github.com/amoudgl/celo), which chooses by name where this rule goes by role.
    """

    needs_roles = True
    adam_lr_ratio: float = hyper(20.0, 0.0, scale="log", search=(1.0, 100.0), doc="AdamW's lr over the network's")
    adam_betas: tuple[float, float] = hyper(
        (0.9, 0.95), 0.0, 1.0, open_high=True, scale="decay", search=(0.8, 0.999), doc="AdamW's EMA decays"
    )
    adam_eps: float = hyper(1e-8, 0.0, scale="log", search=(1e-10, 1e-4), doc="added to AdamW's second moment")
    adam_bias_correction: bool = option(False, choices=(False, True), doc="of AdamW's moments")

    def takes(self, info: ParamInfo) -> bool:
        """Matrices and kernels that are no embeddings."""
        return len(info.shape) >= 2 and info.role != "embedding"

    @cached_property
    def other(self) -> ElementwiseRule:
        """AdamW."""
        return _AdamW(adam_bias_correction=self.adam_bias_correction)

    def shaped(self, direction: Tensor) -> Tensor:
        """Orthogonalised."""
        axes = (0, 1) if self.layout == "torch" else (-2, -1)
        matrices = direction.movedim(axes, (-2, -1))
        return newton_schulz(matrices, NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ_EPS).movedim((-2, -1), axes)


class _AdamW(ElementwiseRule):
    """The other half of `Celo2`, under the names of its hyperparameters; they are Celo2's, not the defaults here."""

    lr: float = learning_rate(1e-3, search=(1e-4, 1e-2))
    weight_decay: float = hyper(0.0, 0.0)
    adam_lr_ratio: float = hyper(20.0, 0.0)
    adam_betas: tuple[float, float] = hyper((0.9, 0.95), 0.0, 1.0, open_high=True)
    adam_eps: float = hyper(1e-8, 0.0)
    adam_bias_correction: bool = option(False, choices=(False, True))
    slots = ("exp_avg", "exp_avg_sq")

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """Bias corrections and decay; see `Celo2`."""
        beta1, beta2 = hp["adam_betas"]
        lr = hp["lr"] * hp["adam_lr_ratio"]
        return {
            "beta1": beta1,
            "beta2": beta2,
            "step_size": lr / (1 - beta1**t) if self.adam_bias_correction else lr,
            "correction": 1 / (1 - beta2**t) if self.adam_bias_correction else 1.0,
            "eps": hp["adam_eps"],
            "decay": 1 - lr * hp["weight_decay"],
        }

    def elementwise(
        self, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, beta2: Any, step_size: Any,
        correction: Any, eps: Any, decay: Any,
    ) -> Any:  # fmt: skip
        """See `Celo2`."""
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + grad * grad * (1 - beta2)
        return param * decay - exp_avg * step_size / torch.sqrt(exp_avg_sq * correction + eps), exp_avg, exp_avg_sq
