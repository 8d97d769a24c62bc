"""What the two sides say to each other: frames of plain bytes, of which nothing is ever unpickled.

A frame is a kind, the number of the request it belongs to, a length and that many bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

HEADER = struct.Struct("<BIQ")
LONGEST_ERROR = 300
"""Bytes of a candidate's error text."""


class Kind(IntEnum):
    """What a frame is."""

    READY = 1  # one byte: the `Level` reached
    SOURCE = 2  # JSON: source, tensors, scalars
    EVALUATE = 3  # `EVALUATION`, then the inputs and perhaps the weights
    VALUES = 4  # losses, then one gradient per input if there were weights
    ERROR = 5  # text


EVALUATION = struct.Struct("<BI?")
"""Of an evaluation: bytes per number (4 or 8), examples, whether weights follow."""


@dataclass(frozen=True)
class Frame:
    """A frame; see the module."""

    kind: int
    number: int
    payload: bytes

    def encode(self) -> bytes:
        """As it goes through the pipe."""
        return HEADER.pack(self.kind, self.number, len(self.payload)) + self.payload
