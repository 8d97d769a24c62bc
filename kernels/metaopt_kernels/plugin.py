"""What this plugin offers: the fused passes of NVIDIA GPUs."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_kernels() -> list[Spec]:
    """Triton."""
    return [Spec("cuda", "metaopt_kernels.triton_kernels:TritonKernels", "Triton, generated from rules and tasks")]
