"""The engine's own plugin: unroll back-ends, episode lengths, curricula and the torch exporter."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_unroll_backends() -> list[Spec]:
    """Ways to run one inner step of all copies."""
    return [
        Spec("eager", "metaopt.backends:eager", "all copies under vmap, op by op"),
        Spec("loop", "metaopt.backends:loop", "one copy after the other, without vmap"),
        Spec("compile", "metaopt.backends:compiled", "torch.compile of the vectorised step"),
        Spec("graph", "metaopt.graph_backend:graph", "a CUDA graph of the whole window; on a GPU"),
        Spec("fused", "metaopt.backends:fused", "whole windows, or else parts of a step, by the device's kernels"),
    ]


@hookimpl
def metaopt_kernels() -> list[Spec]:
    """C++."""
    return [Spec("cpu", "metaopt.cpp_kernels:CppKernels", "generated C++, where a compiler is found")]


@hookimpl
def metaopt_truncations() -> list[Spec]:
    """Lengths of episodes."""
    where = "metaopt.meta.truncation"
    return [
        Spec("constant", f"{where}:Constant", "every episode as long"),
        Spec("log_uniform", f"{where}:LogUniform", "between two lengths", paper="Metz et al., 2022, arXiv:2211.09760"),
        Spec(
            "growing", f"{where}:Growing", "log-uniform; longer ones later", paper="Metz et al., 2019, arXiv:1810.10180"
        ),
    ]


@hookimpl
def metaopt_curricula() -> list[Spec]:
    """Choices of tasks."""
    where = "metaopt.meta.curriculum"
    return [
        Spec("uniform", f"{where}:Uniform", "every task alike"),
        Spec(
            "regret",
            f"{where}:Regret",
            "tasks where tuned AdamW is better first",
            paper="Jackson et al., 2023, arXiv:2310.02782",
        ),
    ]


@hookimpl
def metaopt_exporters() -> list[Spec]:
    """One file that needs only torch."""
    return [Spec("torch", "metaopt.export:write_module", "a Python file with one torch.optim.Optimizer class")]
