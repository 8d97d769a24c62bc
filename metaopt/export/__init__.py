"""Rules as files that need only torch."""

from metaopt.export.module import write_module
from metaopt.export.rewrite import ExportError

__all__ = ["ExportError", "write_module"]
