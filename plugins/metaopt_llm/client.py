"""The client that proposers ask: answers had before, budget, retries, and the strictest form that the server can hold."""

from __future__ import annotations

import dataclasses
import logging
import random
import time

from metaopt.search.keys import redact
from metaopt.search.ledger import Charge, Ledger
from metaopt_llm.chat import ChatError, ChatReply, ChatRequest, ChatServer, Mode, Price, request_key

_LOG = logging.getLogger("metaopt")
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between tries; they double


class Client:
    """Asks one server, and never twice what it has answered.

    Args:
        server: who is asked.
        ledger: where calls are written down and paid; of all clients of a search.
        price: of the server's tokens.
        attempts: calls for one answer: timeouts, 408, 409, 429 and 5xx are tried again, after the time that the server names
            or twice the last one, shortened at random by up to a half so that clients do not come back together.
        timeout: seconds for one call.
        deadline: seconds for one answer, all attempts and waits included.

    Raises:
        ValueError: a limit below 1 attempt or of no time.
    """

    def __init__(
        self,
        server: ChatServer,
        ledger: Ledger,
        price: Price = Price(),  # noqa: B008 - it is frozen
        attempts: int = 5,
        timeout: float = 120.0,
        deadline: float = 600.0,
    ) -> None:
        if attempts < 1 or not timeout > 0 or not deadline > 0:
            raise ValueError(
                f"attempts must be at least 1, timeout and deadline above 0 seconds, got {attempts}, {timeout} and {deadline}"
            )
        self._server, self._ledger, self._price = server, ledger, price
        self._attempts, self._timeout, self._deadline = attempts, timeout, deadline
        self._unsupported: set[Mode] = set()

    def complete(self, request: ChatRequest) -> ChatReply:
        """See `metaopt_llm.chat.ChatClient`."""
        messages = tuple(dataclasses.replace(m, content=redact(m.content)) for m in request.messages)
        request = dataclasses.replace(request, messages=messages)
        key = request_key(self._server.identity, request)
        if (known := self._ledger.reply(key)) is not None:
            return ChatReply(**known)
        end = time.monotonic() + self._deadline
        modes = [mode for mode in self._server.modes if mode not in self._unsupported and _applies(mode, request)]
        for mode in modes:
            try:
                reply = self._try(key, request, mode, end)
            except ChatError as error:
                if not error.unsupported or mode == modes[-1]:
                    raise
                _LOG.info("trying without %s: %s", mode, error)
                continue
            self._unsupported.update(modes[: modes.index(mode)])
            return reply
        raise AssertionError("every server knows the mode text")

    def _try(self, key: str, request: ChatRequest, mode: Mode, end: float) -> ChatReply:
        wait = _FIRST_WAIT
        for attempt in range(1, self._attempts + 1):
            try:
                return self._call(key, request, mode, min(self._timeout, end - time.monotonic()))
            except ChatError as error:
                pause = error.wait if error.wait is not None else wait * random.uniform(0.5, 1.0)
                if not error.retry:
                    raise
                if attempt == self._attempts or time.monotonic() + pause >= end:
                    tries = "1 call" if attempt == 1 else f"{attempt} calls"
                    raise ChatError(f"no answer after {tries}: {error}") from None
                _LOG.info("call %d of %d failed, the next one in %.1f s: %s", attempt, self._attempts, pause, error)
                time.sleep(pause)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")

    def _call(self, key: str, request: ChatRequest, mode: Mode, seconds: float) -> ChatReply:
        most = self._price.most(request)
        number = self._ledger.ask(key, dataclasses.asdict(request), most)
        try:
            reply = self._server.exchange(request, mode, seconds)
        except ChatError as error:
            self._ledger.failed(number, str(error), most if error.billed else Charge(calls=1), error.kind)
            raise
        counted = reply.input_tokens is not None and reply.output_tokens is not None
        charge = self._price.of(reply.input_tokens or 0, reply.output_tokens or 0) if counted else most
        reply = dataclasses.replace(reply, cost=charge.money)
        self._ledger.answered(number, dataclasses.asdict(reply), charge)
        return reply


class Recorded:
    """Answers in the order in which a ledger holds them, whatever is asked: for tests of what comes after.

    Args:
        ledger: of an earlier search.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._replies = iter(ledger.replies)

    def complete(self, request: ChatRequest) -> ChatReply:
        """The next one.

        Raises:
            ChatError: there are no more.
        """
        reply = next(self._replies, None)
        if reply is None:
            raise ChatError("the ledger holds no further answer")
        return ChatReply(**reply)


def _applies(mode: Mode, request: ChatRequest) -> bool:
    if mode == "grammar":
        return request.grammar is not None
    return mode == "text" or request.schema is not None
