"""What this plugin offers: learned optimizers and the estimators that meta-train them."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_learned_optimizers() -> list[Spec]:
    """Rules with meta-parameters."""
    return [
        Spec(
            "small_fc_lopt", "metaopt_learned.adafac_mlp:AdafacMLP",
            "a tiny MLP on momentum, Adam and Adafactor features of every parameter",
            ("mlp",), "Metz et al., 2022, https://arxiv.org/abs/2203.11860",
        )
    ]  # fmt: skip


@hookimpl
def metaopt_estimators() -> list[Spec]:
    """Meta-gradients from perturbations."""
    return [
        Spec(
            "es", "metaopt_learned.es:TruncatedES",
            "antithetic evolution strategies on truncated unrolls",
            ("black-box", "truncated"), "Salimans et al., 2017, https://arxiv.org/abs/1703.03864",
        ),
        Spec(
            "pes", "metaopt_learned.es:PES",
            "persistent evolution strategies: unbiased over truncations",
            ("black-box", "truncated"), "Vicol, Metz and Sohl-Dickstein, 2021, https://arxiv.org/abs/2112.13835",
        ),
    ]  # fmt: skip
