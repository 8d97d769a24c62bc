"""Triton kernels (none yet; see docs/architecture.md)."""
