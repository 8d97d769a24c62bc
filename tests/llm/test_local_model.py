"""A real model on this machine, end to end: server, grammar, seeds. Of quality nothing is asked: it has 135M parameters."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from metaopt.search import Elite, Ledger, Proposal, Request
from metaopt_llm.chat import ChatError, ChatRequest, Message
from metaopt_llm.client import Client
from metaopt_llm.form import python_form
from metaopt_llm.local_model import LocalServer, packaged_model
from metaopt_llm.proposers import LLMProposer
from metaopt_llm.template_files import Templates

pytest.importorskip("xllamacpp", reason="no wheel of llama.cpp: pip install 'torch-metaopt[local-llm]'")
try:
    packaged_model()
except ValueError as absent:
    pytest.skip(f"no model: {absent}", allow_module_level=True)

FORM = python_form("preference_loss", Templates())
KNOWN = tuple(
    Elite(name, f"def loss(rho, beta):\n    x = beta * rho\n    return {value}", score, {}, 0, 0, facts={"name": name})
    for name, value, score in (("slic", "torch.relu(1 - x)", 0.52), ("dpo", "-F.logsigmoid(x)", 0.5))
)
_TORCH = ["sigmoid", "tanh", "relu", "square", "abs", "where", "maximum"]
CALLED = {"F.logsigmoid", "F.softplus", *(f"torch.{name}" for name in _TORCH)}


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    server = LocalServer()
    yield server
    server.close()


def described(source: str) -> str | None:
    """What of the description in ``preference_loss.txt`` a text does not keep to."""
    try:
        (function,) = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        return f"one function of Python is wanted: {error}"
    called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    if not isinstance(function, ast.FunctionDef) or not isinstance(function.body[-1], ast.Return) or called - CALLED:
        return f"a function that calls {', '.join(sorted(CALLED))} is wanted"
    return None


def test_every_answer_keeps_to_the_grammar_and_a_seed_gives_the_same_again(server: LocalServer) -> None:
    def propose(number: int) -> Proposal:
        proposer = LLMProposer(Client(server, Ledger()), FORM, described, template="opro", repairs=0, max_tokens=256)
        return proposer.propose(Request(number, "Learn from preferences.", KNOWN))

    found = [propose(number) for number in range(4)]
    assert [p.error for p in found] == [""] * 4
    assert len({p.source for p in found}) >= 3
    assert all(p.tokens > 0 for p in found)
    assert propose(0) == found[0]


def health(server: LocalServer) -> int:
    return httpx.get(server.base_url.removesuffix("/v1") + "/health").status_code


def test_it_listens_on_this_machine_alone_and_stops_whatever_it_is_doing() -> None:
    server = LocalServer()
    assert server.base_url.startswith("http://127.0.0.1:")
    assert health(server) == 200
    with ThreadPoolExecutor(1) as thread:
        long = ChatRequest((Message("user", "one two three " * 1000),), max_tokens=1000)  # half a minute to read alone
        under_way = thread.submit(server.exchange, long, "text", 60.0)
        time.sleep(0.5)
        server.close()
        with pytest.raises(ChatError, match=r"broke off|cannot be reached"):
            under_way.result(timeout=10)
    with pytest.raises(httpx.ConnectError):
        health(server)


HOLDS = """
from metaopt_llm.local_model import LocalServer
server = LocalServer()
print(server.base_url, flush=True)
{then}
"""


@pytest.mark.parametrize(("then", "code"), [("", 0), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_it_ends_with_the_process_that_began_it(then: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS.format(then=then)], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert done.returncode == code
    address = done.stdout.strip().removesuffix("/v1")
    deadline = time.monotonic() + 10
    with pytest.raises(httpx.ConnectError):
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):  # it ends while it answers
                httpx.get(address + "/health")
            time.sleep(0.05)


def test_a_file_that_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="is no file"):
        LocalServer("absent.gguf")
    with pytest.raises(ValueError, match="cannot serve"):
        LocalServer(__file__)
