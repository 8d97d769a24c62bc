"""Text that every Python carries along: its own documentation and the source code of its standard library.

Both are part of CPython (Python Software Foundation License) and differ a little between Python versions: compare losses
only within one version (`text_version`). The documentation is ``pydoc_data.topics`` (the language reference's topics that
``help()`` shows), all topics in sorted order of their keys: about 465,000 characters in Python 3.11. The source code is
that of the modules in `SOURCE_FILES`, in that order: about 1.96 million characters in Python 3.11.
"""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt.task import Batch, Split
from metaopt_tasks.choices import require_choice

VOCABULARY_SIZE = 64
BYTES = 256
LEVELS = ("chars", "bytes")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_TRAIN_SHARE, _VALID_SHARE = 0.90, 0.05

SOURCE_FILES = (
    "argparse.py", "ast.py", "base64.py", "bdb.py", "bisect.py", "calendar.py", "cmd.py", "code.py", "codecs.py",
    "collections/__init__.py", "colorsys.py", "configparser.py", "contextlib.py", "copy.py", "csv.py",
    "dataclasses.py", "difflib.py", "dis.py", "enum.py", "filecmp.py", "fnmatch.py", "fractions.py", "functools.py",
    "gettext.py", "graphlib.py", "gzip.py", "heapq.py", "hmac.py", "html/parser.py", "http/client.py", "inspect.py",
    "ipaddress.py", "json/decoder.py", "json/encoder.py", "logging/__init__.py", "netrc.py", "optparse.py",
    "pprint.py", "queue.py", "random.py", "sched.py", "selectors.py", "shlex.py", "shutil.py", "socket.py",
    "statistics.py", "subprocess.py", "textwrap.py", "threading.py", "timeit.py", "tokenize.py", "traceback.py",
    "types.py", "urllib/parse.py", "uuid.py", "warnings.py", "weakref.py",
)  # fmt: skip
"""Files of the standard library that Python 3.11 to 3.14 have under the same names."""


@dataclass(frozen=True)
class TextWindows(Split):
    """Windows of ``context + 1`` tokens of one text ``tokens`` [N] int64; window i starts at token i * stride.

    Attributes:
        context: tokens that predict, at most, the next one.
        stride: between the starts of two windows.
        vocabulary_size: tokens are below it, whether or not all of them occur.
    """

    context: int = 32
    stride: int = 1
    vocabulary_size: int = VOCABULARY_SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self) < 1:
            tokens = len(self.tensors["tokens"])
            raise ValueError(f"context must be less than the split's {tokens} tokens, got {self.context}")

    def __len__(self) -> int:
        return max(0, (len(self.tensors["tokens"]) - self.context - 1) // self.stride + 1)

    def take(self, indices: Tensor) -> Batch:
        """``tokens`` [..., context + 1] of the windows ``indices`` [...]."""
        tokens = self.tensors["tokens"]
        offsets = torch.arange(self.context + 1, device=tokens.device)
        return {"tokens": tokens[(indices * self.stride).unsqueeze(-1) + offsets]}


def text_version() -> str:
    """What the texts depend on: ``"python-3.11"``."""
    return f"python-{sys.version_info.major}.{sys.version_info.minor}"


def vocabulary(source: str = "pydoc_text") -> str:
    """The character of each token id: U+FFFD for all rare ones, then the train part's 63 most frequent in order."""
    return _encoded(source)[0]


def pydoc_text(device: Any = "cpu", context: int = 32, level: str = "chars") -> dict[str, Split]:
    """Python's documentation, cut into the first 90 % (train), the next 5 % (valid) and the last 5 % (test).

    Training windows start at every token; valid and test windows do not share targets (their stride is ``context``), so a
    mean over all of them is the mean over the tokens.

    Args:
        device: where the tokens live.
        context: tokens that predict the next one.
        level: ``chars`` (64 tokens, see `vocabulary`) or ``bytes`` (256 tokens, UTF-8).
    """
    return _windows("pydoc_text", device, context, level)


def python_source(device: Any = "cpu", context: int = 32, level: str = "bytes") -> dict[str, Split]:
    """Source code of Python's standard library, cut and encoded as `pydoc_text`."""
    return _windows("python_source", device, context, level)


def _windows(source: str, device: Any, context: int, level: str) -> dict[str, Split]:
    require_choice("level", level, LEVELS)
    size = VOCABULARY_SIZE if level == "chars" else BYTES
    tokens = (_encoded(source)[1] if level == "chars" else _bytes(source)).to(device)
    ends = [round(_TRAIN_SHARE * len(tokens)), round((_TRAIN_SHARE + _VALID_SHARE) * len(tokens))]
    strides = {"train": 1, "valid": context, "test": context}
    return {
        name: TextWindows({"tokens": part}, context, stride, size)
        for (name, stride), part in zip(strides.items(), tokens.tensor_split(ends), strict=True)
    }


@cache
def _text(source: str) -> str:
    if source == "pydoc_text":
        from pydoc_data.topics import topics

        return "".join(topics[key] for key in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    return "".join((library / file).read_text(encoding="utf-8") for file in SOURCE_FILES)


@cache
def _encoded(source: str) -> tuple[str, Tensor]:
    codes = torch.frombuffer(bytearray(_text(source), "utf-32-le"), dtype=torch.int32).long()
    counts = codes[: round(_TRAIN_SHARE * len(codes))].bincount().tolist()
    frequent = sorted(range(len(counts)), key=lambda code: (-counts[code], code))[: VOCABULARY_SIZE - 1]
    ids = torch.zeros(int(codes.max()) + 1, dtype=torch.int64)
    ids[frequent] = torch.arange(1, VOCABULARY_SIZE)
    return _UNKNOWN + "".join(map(chr, frequent)), ids[codes]


@cache
def _bytes(source: str) -> Tensor:
    return torch.frombuffer(bytearray(_text(source), "utf-8"), dtype=torch.uint8).to(torch.int64)
