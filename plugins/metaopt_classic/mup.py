"""muP: learning rates by role and width, so that those tuned on a narrow model hold for a wide one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaopt.rule import (
    Context,
    HyperValues,
    ParamInfo,
    Params,
    PerParameter,
    State,
    UpdateRule,
    fans,
    hp_of,
)
from metaopt.space import option
from metaopt_classic.adam import AdamW

_LIKE = ("adam", "sgd", "muon")


class MuP(UpdateRule):
    r"""Any rule with an ``lr``, under the maximal update parametrisation.

    With n = fan_in / base fan_in and m = fan_out / base fan_out of each parameter, its lr is multiplied by

    * 1 / n for rules whose steps do not grow with the gradients (``adam``; Lion and Muon by default too),
    * m / n for rules whose steps are proportional to them (``sgd``),
    * 1 / n, but 1 for hidden matrices, where those get steps of a fixed spectral norm (``muon``: of scaling "original"),

    and its ``weight_decay`` by the inverse, so that lr times decay, the share of a weight that each step takes away, is
    that of the base at any width. Adam's eps is left as it is and must stay well below the gradients, most of which
    fall with 1 / n.

    Where all hidden widths grow alike, the first two are Table 3 of Yang et al., 2022 (https://arxiv.org/abs/2203.03466):
    hidden weights have n = m, output weights m = 1; input weights, embeddings, biases and norms n = 1. It equals
    Table 8, whose output multiplier is here part of the output weights (Lemma J.1). The third follows from the spectral
    condition of Yang, Simon and Bernstein, 2023 (https://arxiv.org/abs/2310.17813). All presume initial weights of
    standard deviation 1 / sqrt(fan_in), output weights of 1 / fan_in, and attention scores divided by the heads' width
    and not its root. A head that shares the embedding's weights is not seen.

    Args:
        rule: the rule, with hyperparameters tuned on the base.
        base: a narrower model: its parameters, their facts or their shapes by name (``dict(model.named_parameters())``,
            ``task.init(...)``, ``task.info()``), on which ``rule`` is left as it is. Or one number as the base of every
            fan that grows with width, by role: no second model, but at no width quite what the rule alone does.
        like: whose steps the rule's are like: ``adam``, ``sgd`` or ``muon``.
        scale_decay: False for an L2 penalty in front of an adaptive rule, as in ``Adam``.
    """

    rule: UpdateRule
    base: Any = 64
    like: str = option("adam", choices=_LIKE, doc="whose steps the rule's are like")
    scale_decay: bool = option(True, choices=(False, True), doc="scale weight_decay by the inverse of lr's factor")

    def __post_init__(self) -> None:
        base = self.base
        if isinstance(base, int) and base >= 1:
            pass
        elif isinstance(base, (Mapping, tuple)) and base:
            # sorted pairs: hashable, so that equal rules share compiled code
            shapes = {name: tuple(getattr(value, "shape", value)) for name, value in dict(base).items()}
            object.__setattr__(self, "base", tuple(sorted(shapes.items())))
        else:
            raise ValueError(
                f"base must be a width of at least 1, or the parameters of a narrower model by name, got {base!r}"
            )
        super().__post_init__()
        if "lr" not in self.declared():
            raise ValueError(
                f"MuP scales learning rates, but {type(self.rule).__name__} has no lr; give its lr a field"
            )

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state.

        Raises:
            ValueError: a parameter that the base lacks, or of another number of dimensions there.
        """
        self.factors(info)
        return self.rule.init(params, info)

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """The rule's step with each parameter's own lr and weight decay."""
        by_param = {}
        for name, factor in self.factors({name: ctx.info[name] for name in params}).items():
            own = {**hp_of(hp, name)}
            own["lr"] = own["lr"] * factor
            if self.scale_decay and "weight_decay" in own:
                own["weight_decay"] = own["weight_decay"] / factor
            by_param[name] = own
        return self.rule.update(grads, state, params, PerParameter(by_param), ctx)

    def factors(self, info: Mapping[str, ParamInfo]) -> dict[str, float]:
        """What each parameter's lr is multiplied by; see the class."""
        shapes = {} if isinstance(self.base, int) else dict(self.base)
        found = {}
        for name, own in info.items():
            n, m = self._of_number(self.base, own) if not shapes else self._of_shape(shapes.get(name), name, own)
            if self.like == "muon" and own.role == "hidden":
                n = 1.0
            found[name] = m / n if self.like == "sgd" else 1 / n
        return found

    @staticmethod
    def _of_number(base: int, own: ParamInfo) -> tuple[float, float]:
        n = own.fan_in / base if own.role in ("hidden", "output") else 1.0
        m = own.fan_out / base if own.role != "output" else 1.0
        return n or 1.0, m or 1.0  # an empty parameter has no fans

    @staticmethod
    def _of_shape(base: tuple[int, ...] | None, name: str, own: ParamInfo) -> tuple[float, float]:
        if base is None or len(base) != len(own.shape):
            raise ValueError(
                f"base must hold {name!r} with {len(own.shape)} dimensions, got {base}; "
                f"give the parameters of the same model at another width"
            )
        base_in, base_out = fans(base, own.role)
        return max(own.fan_in, 1) / max(base_in, 1), max(own.fan_out, 1) / max(base_out, 1)


def mup_adamw(base: Any = 64, **hyperparameters: Any) -> MuP:
    """`MuP` over AdamW; ``base`` as there, the rest is AdamW's."""
    return MuP(AdamW(), base).replaced(**hyperparameters)
