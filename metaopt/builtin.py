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
def metaopt_hypergradients() -> list[Spec]:
    """Exact ones of the run, approximations of it, those of the optimum, and those without second derivatives."""
    run, solve = "metaopt.tune.unrolled", "metaopt.tune.inverse"
    first, values = "metaopt.tune.first_order", "metaopt.tune.evolution"
    maclaurin = "Maclaurin et al., 2015, arXiv:1502.03492"
    return [
        Spec("unroll", f"{run}:Unroll", "exact: one autograd graph of the run", ("exact",), maclaurin),
        Spec("checkpoint", f"{run}:Checkpoint", "exact: the graph of one of sqrt(T) segments at a time", ("exact",),
             "Chen et al., 2016, arXiv:1604.06174"),
        Spec("replay", f"{run}:Replay", "exact: the adjoint of some steps at a time, states from a checkpoint tree", ("exact",),
             "Engstrom et al., 2025, arXiv:2503.13751"),
        Spec("forward", "metaopt.tune.forward:Forward", "exact: tangents of all hypers along the run", ("exact",),
             "Franceschi et al., 2017, arXiv:1703.01785"),
        Spec("truncated", f"{run}:Truncated", "the last steps of the run only", ("biased",),
             "Shaban et al., 2019, arXiv:1810.10667"),
        Spec("cg", f"{solve}:ConjugateGradient", "of the optimum, by conjugate gradients", ("implicit",),
             "Pedregosa, 2016, arXiv:1602.02355"),
        Spec("neumann", f"{solve}:Neumann", "of the optimum, by a Neumann series", ("implicit",),
             "Lorraine et al., 2020, arXiv:1911.02590"),
        Spec("nystrom", f"{solve}:Nystrom", "of the optimum, by a low-rank Hessian", ("implicit",),
             "Hataya and Yamada, 2023, arXiv:2302.09726"),
        Spec("identity", f"{solve}:Identity", "of the optimum, by a multiple of the identity", ("implicit", "biased"),
             "Luketina et al., 2016, arXiv:1511.06727"),
        Spec("fixed_point", f"{solve}:FixedPoint", "of the fixed point of the step", ("implicit",),
             "Grazzi et al., 2020, arXiv:2006.16218"),
        Spec("darts", f"{first}:Darts", "one step, by finite differences", ("first-order", "biased"),
             "Liu et al., 2019, arXiv:1806.09055"),
        Spec("sama", f"{first}:Sama", "one step of the optimizer itself, by finite differences", ("first-order", "biased"),
             "Choe et al., 2023, arXiv:2310.05674"),
        Spec("penalty", f"{first}:Penalty", "of the value function, by a second run", ("first-order",),
             "Kwon et al., 2023, arXiv:2301.10945"),
        Spec("es", f"{values}:Evolution", "evolution strategies: runs at perturbed hypers", ("values", "noisy"),
             "Salimans et al., 2017, arXiv:1703.03864"),
    ]  # fmt: skip


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
