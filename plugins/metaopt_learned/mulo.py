"""The factored-accumulator MLP optimizer under the maximal update parametrisation (muLO)."""

from __future__ import annotations

from typing import ClassVar

from metaopt.learned import Theta
from metaopt.perparameter import Prepared
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State
from metaopt.space import option
from metaopt_learned.adafac_mlp import AdafacMLP


class MuLO(AdafacMLP):
    r"""`AdafacMLP` whose steps on hidden weights are divided by fan_in, so that it holds at widths it never trained on.

    .. math:: p \leftarrow (1 - \eta\lambda)\, p - \eta\, f c\, d\, e^{0.001 s}, \qquad
        f = \frac{h}{\mathrm{fan\_in}} \text{ for hidden weights, else } 1

    with h = ``hidden_multiplier``. Entries of gradients that are not a number count as 0. Roles are those of `ParamInfo`.

    It presumes a model in the parametrisation of Table 8 of Yang et al., 2022 (https://arxiv.org/abs/2203.03466): input
    and hidden weights of variance 1 / fan_in, biases of variance 1, output weights 0, logits multiplied by a constant over
    the width, attention scores divided by the heads' width and not its root. For models whose output weights hold that
    multiplier (docs/mup.md), ``output="weights"`` divides their steps by fan_in too, as Lemma J.1 there says for rules
    whose steps do not grow with the gradients. Thérien et al., 2024, "muLO: Compute-Efficient Meta-Generalization of
    Learned Optimizers" (https://arxiv.org/abs/2406.00153).
    """

    needs_roles = True
    hidden: int = option(32, low=1, doc="width H of both hidden layers")
    step_scale: float = option(0.01, doc="constant c of the step")
    hidden_multiplier: float = option(1.0, doc="constant h over fan_in")
    output: str = option("logits", choices=("logits", "weights"), doc="what the output multiplier is part of")
    nan_to_zero: ClassVar[bool] = True

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """As in `TimedMLP`, with the factor f in the scale."""
        prepared = super().prepare(theta, state, params, hp, ctx)
        factors = {name: self.factor(ctx.info[name]) for name in params}
        scale = {name: value if factors[name] == 1 else value * factors[name] for name, value in prepared.scale.items()}
        return prepared._replace(scale=scale)

    def factor(self, info: ParamInfo) -> float:
        """f of one parameter."""
        divided = ("hidden", "output") if self.output == "weights" else ("hidden",)
        if info.role not in divided:
            return 1.0
        return (self.hidden_multiplier if info.role == "hidden" else 1.0) / max(info.fan_in, 1)
