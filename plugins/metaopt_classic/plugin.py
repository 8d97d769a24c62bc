"""What this plugin offers: hand-designed optimizers."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_optimizers() -> list[Spec]:
    """One spec for each name that a user may type."""
    heavy_ball = "Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html"
    return [
        Spec(
            "sgd", "metaopt_classic.sgd:SGD",
            "stochastic gradient descent",
            ("elementwise",), "Robbins and Monro, 1951, https://doi.org/10.1214/aoms/1177729586",
        ),
        Spec(
            "momentum", "metaopt_classic.sgd:SGD",
            "SGD with heavy-ball momentum 0.9",
            ("elementwise",), heavy_ball, {"momentum": 0.9},
        ),
        Spec(
            "nesterov", "metaopt_classic.sgd:SGD",
            "SGD with Nesterov momentum 0.9",
            ("elementwise",), heavy_ball, {"momentum": 0.9, "nesterov": True},
        ),
        Spec(
            "adam", "metaopt_classic.adam:Adam",
            "bias-corrected first and second moments, L2 weight decay",
            ("elementwise", "adaptive"), "Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980",
        ),
        Spec(
            "adamw", "metaopt_classic.adam:AdamW",
            "Adam with decoupled weight decay",
            ("elementwise", "adaptive"), "Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101",
        ),
        Spec(
            "amsgrad", "metaopt_classic.adam:AMSGrad",
            "Adam whose second moment never shrinks",
            ("elementwise", "adaptive"), "Reddi, Kale and Kumar, 2018, https://arxiv.org/abs/1904.09237",
        ),
        Spec(
            "adabelief", "metaopt_classic.adam:AdaBelief",
            "Adam on the variance of gradients around their mean",
            ("elementwise", "adaptive"), "Zhuang et al., 2020, https://arxiv.org/abs/2010.07468",
        ),
        Spec(
            "lamb", "metaopt_classic.adam:LAMB",
            "AdamW's direction, each tensor's scaled to its parameter's norm",
            ("adaptive", "layerwise"), "You et al., 2020, https://arxiv.org/abs/1904.00962",
        ),
        Spec(
            "rmsprop", "metaopt_classic.rmsprop:RMSprop",
            "gradients over the root of their second moment",
            ("elementwise", "adaptive"),
            "Tieleman and Hinton, 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf",
        ),
        Spec(
            "lion", "metaopt_classic.lion:Lion",
            "sign of an interpolated momentum, decoupled weight decay",
            ("elementwise", "sign"), "Chen et al., 2023, https://arxiv.org/abs/2302.06675",
        ),
        Spec(
            "adafactor", "metaopt_classic.adafactor:Adafactor",
            "second moments factored into rows and columns",
            ("matrix", "adaptive"), "Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235",
        ),
        Spec(
            "muon", "metaopt_classic.muon:Muon",
            "orthogonalised momentum for hidden matrices, AdamW elsewhere",
            ("matrix",), "Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/",
        ),
        Spec(
            "mup_adamw", "metaopt_classic.mup:mup_adamw",
            "AdamW whose learning rates go by role and width",
            ("wrapper", "adaptive"), "Yang et al., 2022, https://arxiv.org/abs/2203.03466",
        ),
        Spec(
            "scheduled", "metaopt_classic.learning_rates:scheduled",
            "AdamW, or any rule, with a schedule of its learning rate",
            ("wrapper",), "Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983",
        ),
        Spec(
            "by_role", "metaopt_classic.learning_rates:by_role",
            "AdamW, or any rule, with learning rates by role of the parameter",
            ("wrapper",),
        ),
    ]  # fmt: skip
