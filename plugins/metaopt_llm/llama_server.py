"""llama.cpp's server in a process of its own: ``python -m metaopt_llm.llama_server MODEL CONTEXT``.

In the process that asks it, it cannot be ended for sure: ending it waits, with Python's lock held, for answers that are under
way and for a queue that may not have begun. It ends when its standard input does, so also when its parent is killed.
"""

from __future__ import annotations

import os
import sys

LISTENING, FAILED = "listening ", "failed "
"""Beginnings of the line that says where, or why not."""


def main(model: str, context: str) -> None:
    """Serve ``model`` on a free port of 127.0.0.1 until standard input ends."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.n_ctx, settings.n_parallel = int(context), 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.n_threads_http = 2
    settings.ui = settings.endpoint_slots = False
    settings.cache_prompt = False  # a question that is partly cached is computed in other batches, and rounds otherwise
    settings.verbosity = -1
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        print(FAILED, error, sep="", flush=True)
        return
    print(LISTENING, server.listening_address, sep="", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
