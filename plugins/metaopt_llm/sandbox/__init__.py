"""Losses in free Python, run in a process that can do nothing but compute; opt-in, Linux only (docs/llm-safety.md)."""

from metaopt_llm.sandbox.free_loss import FreeLoss
from metaopt_llm.sandbox.limits import Level, Limits
from metaopt_llm.sandbox.sandbox import CandidateError, Sandbox, SandboxError, probe

__all__ = ["CandidateError", "FreeLoss", "Level", "Limits", "Sandbox", "SandboxError", "probe"]
