"""Triton kernels for NVIDIA GPUs: see docs/kernels.md."""
