"""What this package offers. Imported whenever something is listed, so it imports no torch."""

from metaopt import Spec, hookimpl


@hookimpl
def metaopt_optimizers() -> list[Spec]:
    """One rule."""
    return [Spec("soft_sign", "metaopt_example.rule:SoftSign", "sign momentum that slows down near zero")]


@hookimpl
def metaopt_tasks() -> list[Spec]:
    """One task."""
    return [Spec("least_squares", "metaopt_example.task:least_squares", "linear regression on made-up data")]
