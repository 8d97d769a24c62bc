"""The engine's own plugin: unroll back-ends, the torch exporter and the two losses that every suite needs."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_unroll_backends() -> list[Spec]:
    """Two ways to run the vectorised step."""
    return [
        Spec("eager", "metaopt.unroll:eager", "torch.func.vmap, op by op; the reference of all others"),
        Spec("compile", "metaopt.unroll:compiled", "torch.compile of the vectorised step"),
    ]


@hookimpl
def metaopt_exporters() -> list[Spec]:
    """One file that needs only torch."""
    return [Spec("torch", "metaopt.export:write_module", "a Python file with one torch.optim.Optimizer class")]


@hookimpl
def metaopt_objectives() -> list[Spec]:
    """Losses per example: nothing is averaged."""
    return [
        Spec("cross_entropy", "torch.nn:CrossEntropyLoss", "of logits and classes", defaults={"reduction": "none"}),
        Spec("mse", "torch.nn:MSELoss", "squared error, entry by entry", defaults={"reduction": "none"}),
    ]
