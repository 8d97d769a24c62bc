"""What a server does wrong costs bounded time and money, loses nothing, and is told clearly; keys never leave."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from chat_server import Running, Step, body, completion, cut_off, drip, fails, flood, says, serving, silence

from metaopt import registry
from metaopt.search import Budget, BudgetSpent, Charge, Ledger
from metaopt_llm import client as client_module
from metaopt_llm.chat import ChatError, ChatRequest, Message, Price
from metaopt_llm.client import Client
from metaopt_llm.servers import AnthropicServer, OpenAIServer

KEY = "sk-this-key-must-not-be-seen"
ASKED = ChatRequest((Message("system", "be brief"), Message("user", "hello")), {"type": "object"}, "root ::= [a-z]+", 7)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


def ask(
    running: Running, ledger: Ledger | None = None, dialect: str = "other", request: ChatRequest = ASKED, **limits: Any
) -> str:
    server = OpenAIServer("tiny", running.url, key_env="", dialect=dialect)
    return Client(server, ledger or Ledger(), **{"timeout": 5.0, "deadline": 10.0, **limits}).complete(request).text


FAULTS: dict[str, Step] = {
    "time-out": fails(408),
    "conflict": fails(409),
    "rate limit": fails(429),
    "rate limit with a date that is past": fails(429, Retry_After=email.utils.formatdate(0, usegmt=True)),
    "server error": fails(500),
    "overloaded": fails(529),
    "body cut off": cut_off,
    "JSON cut off": body(completion("a long answer")[:-20]),
    "no JSON": body("<html>bad gateway</html>"),
    "JSON of another form": body('{"answer": 42}'),
    "no choices": body('{"choices": []}'),
    "content of another type": body('{"choices": [{"message": {"content": {"a": 1}}}]}'),
    "nested too deeply": body("[" * 200_000),
    "flood": flood,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_asked_again(fault: str) -> None:
    with serving([FAULTS[fault], FAULTS[fault], says("fine")]) as running:
        assert ask(running) == "fine"
    assert len(running.seen) == 3
    assert len({seen.text for seen in running.seen}) == 1


@pytest.mark.parametrize("fault", [silence, drip])
def test_a_server_that_does_not_finish_is_left_in_time(fault: Step) -> None:
    began = time.monotonic()
    with serving([fault, *[says("fine")] * 9]) as running:  # a healthy answer may take as long on a busy machine
        assert ask(running, timeout=0.5, attempts=10) == "fine"
    assert 0.5 <= time.monotonic() - began < 8  # without the limit, 10 s and more


def test_the_deadline_holds_for_all_attempts_together() -> None:
    began = time.monotonic()
    with serving([silence] * 100) as running, pytest.raises(ChatError, match=r"no answer after \d calls: .*within"):
        ask(running, attempts=100, timeout=0.2, deadline=0.6)
    assert time.monotonic() - began < 6
    assert len(running.seen) <= 3


def test_retry_after_is_honoured() -> None:
    with serving([fails(429, Retry_After="0.5"), says("fine")]) as running:
        began = time.monotonic()
        assert ask(running) == "fine"
    assert time.monotonic() - began >= 0.5


def test_a_retry_after_beyond_the_deadline_is_told_at_once() -> None:
    began = time.monotonic()
    with (
        serving([fails(429, '{"error": "slow down"}', Retry_After="3600")]) as running,
        pytest.raises(ChatError, match=r"no answer after 1 call: .*answered 429.*slow down"),
    ):
        ask(running)
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_pass_is_not_asked_again(status: int) -> None:
    with (
        serving([fails(status, "no such model")]) as running,
        pytest.raises(ChatError, match=f"{status}: no such model"),
    ):
        ask(running)
    assert len(running.seen) == 1


def test_redirects_are_not_followed() -> None:
    with (
        serving([says("stolen")]) as thief,
        serving([fails(307, "", Location=thief.url)]) as running,
        pytest.raises(ChatError, match="307"),
    ):
        ask(running)
    assert not thief.seen


def test_a_server_that_is_not_there() -> None:
    with serving([]) as running:
        pass
    with pytest.raises(ChatError, match=r"no answer after 2 calls: .*cannot be reached"):
        ask(running, attempts=2)


def modes(running: Running) -> list[str]:
    """How each request wanted its answer to be held to its form."""
    found = []
    for asked in (seen.body for seen in running.seen):
        form = asked.get("response_format", {}).get("type", "text")
        found.append("grammar" if "grammar" in asked or "structured_outputs" in asked else form)
    return found


def test_what_a_server_does_not_know_is_left_out_from_then_on() -> None:
    with serving([fails(400), fails(422), fails(501), says("fine"), says("again")]) as running:
        server = OpenAIServer("tiny", running.url, key_env="", dialect="llama.cpp")
        client = Client(server, Ledger())
        assert client.complete(ASKED).mode == "text"
        client.complete(ChatRequest(ASKED.messages, ASKED.schema, ASKED.grammar, seed=8))
    assert modes(running) == ["grammar", "json_schema", "json_object", "text", "text"]
    assert all('"type": "object"' in seen.body["messages"][0]["content"] for seen in running.seen[1:])


def test_a_request_that_is_wrong_in_every_mode_changes_nothing() -> None:
    with serving([fails(400, "too long")] * 3 + [says("fine")]) as running:
        client = Client(OpenAIServer("tiny", running.url, key_env="", dialect="ollama"), Ledger())
        with pytest.raises(ChatError, match="too long"):
            client.complete(ASKED)
        assert client.complete(ASKED).mode == "json_schema"


@pytest.mark.parametrize(
    ("dialect", "there", "absent"),
    [
        ("openai", {"max_completion_tokens": 2048, "temperature": 1.0}, {"seed", "max_tokens", "grammar"}),
        ("vllm", {"structured_outputs": {"grammar": "root ::= [a-z]+"}, "seed": 7}, {"grammar", "response_format"}),
        ("llama.cpp", {"grammar": "root ::= [a-z]+", "max_tokens": 2048, "seed": 7}, {"response_format"}),
        ("ollama", {"max_tokens": 2048, "seed": 7}, {"grammar"}),
        ("other", {"max_tokens": 2048}, {"grammar", "seed"}),
    ],
)
def test_dialects(dialect: str, there: dict[str, Any], absent: set[str]) -> None:
    with serving([says("fine")]) as running:
        ask(running, dialect=dialect)
    asked = running.seen[0].body
    assert there.items() <= asked.items()
    assert not absent & asked.keys()
    assert running.seen[0].path == "/v1/chat/completions"


def test_anthropic_holds_answers_by_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    answer = {
        "model": "claude", "stop_reason": "tool_use",
        "content": [{"type": "text", "text": "so"}, {"type": "tool_use", "name": "propose", "input": {"a": 1}}],
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 3},
    }  # fmt: skip
    with serving([body(json.dumps(answer))]) as running:
        server = AnthropicServer("claude", running.url.removesuffix("/v1"))
        reply = Client(server, Ledger(), Price(2.0, 10.0)).complete(ASKED)
    assert json.loads(reply.text) == {"a": 1}
    assert (reply.input_tokens, reply.output_tokens) == (15, 3)
    assert reply.cost == pytest.approx((15 * 2 + 3 * 10) / 1e6)
    (seen,) = running.seen
    assert seen.path == "/v1/messages"
    assert {"x-api-key": KEY, "anthropic-version": "2023-06-01"}.items() <= {
        k.lower(): v for k, v in seen.headers.items()
    }.items()
    assert seen.body["system"] == "be brief"
    assert seen.body["messages"] == [{"role": "user", "content": "hello"}]
    assert seen.body["tools"][0]["input_schema"] == ASKED.schema
    assert seen.body["tool_choice"] == {"type": "tool", "name": "propose"}
    assert "seed" not in seen.body


def test_keys_never_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in prompts, though an error text held one, nor in what is kept or told, though the server says it back."""
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setenv("OTHER_TOKEN", "a-token-of-another-service")
    caplog.set_level(logging.DEBUG)
    asked = ChatRequest((Message("user", f"environ: {KEY} a-token-of-another-service"),))
    with (
        serving([fails(500, f"bad key {KEY}"), says(f"it is {KEY}"), fails(401, f"bad key {KEY}")]) as running,
        closing(Ledger(tmp_path / "ledger.jsonl")) as ledger,
    ):
        server = OpenAIServer("tiny", running.url, key_env="MY_API_KEY", dialect="other")
        client = Client(server, ledger)
        reply = client.complete(asked)
        with pytest.raises(ChatError) as told:
            client.complete(ChatRequest((Message("user", "once more"),)))
    assert all(seen.headers["Authorization"] == f"Bearer {KEY}" for seen in running.seen)
    assert reply.text == "it is [MY_API_KEY]"
    kept = (tmp_path / "ledger.jsonl").read_text()
    shown = [
        *(seen.text for seen in running.seen),
        kept,
        str(told.value),
        caplog.text,
        repr(server),
        repr(client.__dict__),
    ]
    for text in shown:
        assert KEY not in text
        assert "a-token-of-another-service" not in text
    assert "bad key [MY_API_KEY]" in kept


def test_a_key_is_named_not_given() -> None:
    with pytest.raises(ValueError, match="may be a key") as told:
        OpenAIServer("m", key_env="sk-proj-0123456789")
    assert "0123" not in str(told.value)
    with pytest.raises(ValueError, match="without password") as told:
        OpenAIServer("m", base_url="https://user:hunter2@host/v1")
    assert "hunter2" not in str(told.value)
    with pytest.raises(ValueError, match="http or https"):
        OpenAIServer("m", base_url="file:///etc/passwd")
    with pytest.raises(ValueError, match="dialect must be one of"):
        OpenAIServer("m", dialect="gemini")


def test_a_key_that_is_not_set_is_asked_for_and_nothing_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_API_KEY", raising=False)
    with serving([]) as running, pytest.raises(ChatError, match="MY_API_KEY is not set"):
        Client(OpenAIServer("tiny", running.url, key_env="MY_API_KEY"), Ledger()).complete(ASKED)
    assert not running.seen


def test_a_ledger_is_replayed_without_a_key_and_calls_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_API_KEY", raising=False)
    asked = {"language": "rule", "validate": str, "model": "tiny", "key_env": "MY_API_KEY"}
    for name in ("openai", "anthropic"):
        registry.create("proposer", name, ledger=Ledger(budget=Budget(calls=0)), **asked)
        with pytest.raises(ValueError, match="MY_API_KEY is not set"):
            registry.create("proposer", name, ledger=Ledger(), **asked)


LIMIT = 1360


def numbered(seed: int) -> ChatRequest:
    return ChatRequest((Message("user", "hello"),), seed=seed, max_tokens=20)


@pytest.mark.parametrize(
    ("budget", "answered"),
    [(Budget(calls=3), 3), (Budget(tokens=LIMIT), 6), (Budget(money=LIMIT * 1e-6), 6), (Budget(calls=0), 0)],
)
def test_a_call_that_might_pass_the_budget_is_not_made(budget: Budget, answered: int) -> None:
    """Each takes 120 tokens, and at most 20 more than its request has bytes; a token costs a millionth."""
    price = Price(1.0, 1.0)
    most = price.most(numbered(0)).tokens
    assert 5 * 120 + most <= LIMIT < 6 * 120 + most
    with serving([says("fine")] * 9) as running:
        ledger = Ledger(budget=budget)
        client = Client(OpenAIServer("tiny", running.url, key_env="", dialect="other"), ledger, price)
        for seed in range(answered):
            client.complete(numbered(seed))
        with pytest.raises(BudgetSpent, match="give more to go on"):
            client.complete(numbered(answered))
    assert len(running.seen) == answered
    assert (ledger.spent.calls, ledger.spent.tokens) == (answered, 120 * answered)
    assert ledger.spent.money == pytest.approx(120e-6 * answered)


def test_threads_do_not_pass_the_budget_together() -> None:
    def complete(seed: int) -> str:
        with suppress(BudgetSpent):
            return client.complete(numbered(seed)).text
        return "spent"

    with serving([says("fine")] * 12) as running, ThreadPoolExecutor(12) as threads:
        client = Client(OpenAIServer("tiny", running.url, key_env="", dialect="other"), Ledger(budget=Budget(calls=5)))
        answers = Counter(threads.map(complete, range(12)))
    assert answers == {"fine": 5, "spent": 7}
    assert len(running.seen) == 5


def test_a_notebook_may_ask() -> None:
    async def cell() -> str:
        return ask(running)

    with serving([says("fine")]) as running:
        assert asyncio.run(cell()) == "fine"


def test_what_may_have_been_billed_is_counted() -> None:
    """A call without an answer as the most that it can have cost; one that was refused, only as a call."""
    price = Price(1.0, 1.0)
    most = price.most(numbered(0))
    for step, charge in ((cut_off, most), (fails(401), Charge(calls=1)), (says("x", tokens=None), most)):
        ledger = Ledger()
        with serving([step]) as running:
            client = Client(OpenAIServer("tiny", running.url, key_env="", dialect="other"), ledger, price, attempts=1)
            with suppress(ChatError):
                client.complete(numbered(0))
        assert ledger.spent == charge


def complete_all(url: str, path: Path, seeds: Iterable[int], calls: int | None = None) -> list[str]:
    with closing(Ledger(path, Budget(calls))) as ledger:
        client = Client(OpenAIServer("tiny", url, key_env="", dialect="other"), ledger, attempts=1)
        return [client.complete(numbered(seed)).text for seed in seeds]


def test_a_ledger_replays_without_a_server(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with serving([says(f"answer {i}") for i in range(4)]) as running:
        first = complete_all(running.url, path, range(4))
    assert complete_all(running.url, path, range(4), calls=4) == first == [f"answer {i}" for i in range(4)]
    with pytest.raises(BudgetSpent, match="4 are used"):
        complete_all(running.url, path, [5], calls=4)


def test_a_ledger_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    """Whatever byte the last write came to, no recorded answer is asked for again and no call is forgotten."""
    path = tmp_path / "ledger.jsonl"
    with serving([says("one"), *[says("two")] * 5]) as running:
        complete_all(running.url, path, range(2))
        whole = path.read_bytes()
        last = whole[:-1].rindex(b"\n") + 1  # of the second answer
        for cut in [len(whole), len(whole) - 1, len(whole) - 50, last, last - 7]:
            path.write_bytes(whole[:cut])
            before = len(running.seen)
            with closing(Ledger(path)) as ledger:
                assert ledger.spent.calls == (1 if cut < last else 2)
            assert complete_all(running.url, path, range(2)) == ["one", "two"]
            assert len(running.seen) - before == (cut < len(whole))
            assert complete_all(running.url, path, range(2), calls=3) == ["one", "two"]  # also what came after the cut


def test_two_processes_do_not_share_a_ledger(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="the system has no file locks of this kind")
    held = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ValueError, match="in use by another process"):
        Ledger(tmp_path / "ledger.jsonl")
    held.close()
    Ledger(tmp_path / "ledger.jsonl").close()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(ValueError, match="no ledger"):
        Ledger(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "dear diary\n"
