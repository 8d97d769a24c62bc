"""What this plugin offers: workloads and the data that they train on."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl
from metaopt_tasks.data.catalogue import SOURCES
from metaopt_tasks.suites import task_specs


@hookimpl
def metaopt_tasks() -> list[Spec]:
    """Families and their named members."""
    rescaled = "any task, in units of its own for each run"
    return [
        *task_specs(),
        Spec("rescaled", "metaopt_tasks.rescaled:RescaledFamily", rescaled, ("family", "augmentation")),
    ]


@hookimpl
def metaopt_data_sources() -> list[Spec]:
    """Data that need no download."""
    return list(SOURCES)


@hookimpl
def metaopt_objectives() -> list[Spec]:
    """Losses of a pair of answers as functions of rho, the log-ratio of policy to reference: chosen minus rejected."""
    return [
        Spec(name, f"metaopt_tasks.preference:{factory}", summary, ("preference",), paper)
        for name, factory, summary, paper in (
            ("dpo", "DPO", "-log sigmoid(beta rho)", "Rafailov et al., 2023, https://arxiv.org/abs/2305.18290"),
            ("ipo", "IPO", "(rho - 1 / (2 beta))^2", "Azar et al., 2023, https://arxiv.org/abs/2310.12036"),
            ("slic", "SLiC", "max(0, 1 - beta rho)", "Zhao et al., 2023, https://arxiv.org/abs/2305.10425"),
            ("exponential", "Exponential", "exp(-beta rho)", "Tang et al., 2024, https://arxiv.org/abs/2402.05749"),
            ("lrml", "LogRatioModulated", "DiscoPOP's mix of dpo and exponential", "Lu et al., 2024, https://arxiv.org/abs/2406.08414"),
        )
    ]  # fmt: skip
