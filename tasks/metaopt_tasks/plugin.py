"""What this plugin offers: workloads and the data that they train on."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_tasks() -> list[Spec]:
    """Workloads, small to large."""
    return [
        Spec("quadratic", "metaopt_tasks.quadratic:QuadraticFamily", "random quadratics, no data", ("family",)),
        Spec("digits_mlp", "metaopt_tasks.digits:digits_mlp", "an MLP on 8x8 handwritten digits", ("image",)),
        Spec("digits_conv", "metaopt_tasks.digits:digits_conv", "a small convolutional net on 8x8 digits", ("image",)),
        Spec(
            "char_lm",
            "metaopt_tasks.char_lm:char_lm",
            "a character transformer on the Python language reference",
            ("text",),
        ),
    ]


@hookimpl
def metaopt_data_sources() -> list[Spec]:
    """Data that need no download."""
    return [
        Spec(
            "digits", "metaopt_tasks.digits:digits",
            "1,797 handwritten digits, 8x8, from scikit-learn",
            ("image",), "Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49",
        ),
        Spec(
            "pydoc_text", "metaopt_tasks.char_lm:pydoc_text",
            "the Python language reference, as CPython ships it for help()",
            ("text",),
        ),
    ]  # fmt: skip
