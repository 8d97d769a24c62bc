"""The engine's own plugin: unroll back-ends, the torch exporter and the two losses that every suite needs."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_unroll_backends() -> list[Spec]:
    """Ways to run one inner step of all copies."""
    return [
        Spec("eager", "metaopt.backends:eager", "all copies under vmap, op by op"),
        Spec("loop", "metaopt.backends:loop", "one copy after the other, without vmap"),
        Spec("compile", "metaopt.backends:compiled", "torch.compile of the vectorised step"),
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
