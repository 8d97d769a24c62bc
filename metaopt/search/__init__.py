"""What every search shares: the archive."""

from metaopt.search.archive import Archive, Elite

__all__ = ["Archive", "Elite"]
