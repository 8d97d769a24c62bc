"""One question to a language model and its answer, whoever serves it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from metaopt.search import ProposerError
from metaopt.search.ledger import Charge

Mode = Literal["grammar", "json_schema", "json_object", "text"]
"""How a server holds an answer to its form, the strictest first; ``text`` only asks for it."""


_AROUND = (
    500  # tokens that are put around a question: words about the schema, a chat's template, Anthropic's 350 about tools
)


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class ChatRequest:
    """What is asked.

    Attributes:
        messages: the conversation; the first may be the system's.
        schema: JSON Schema of the answer.
        grammar: GBNF of an answer that need not be JSON, for servers that can hold it.
        seed: which of the answers to the same messages this is; also sent to servers that take a seed.
        temperature: None: the server's own, which is all that some models accept.
        max_tokens: of the answer, hidden reasoning included.
    """

    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    seed: int = 0
    temperature: float | None = 1.0
    max_tokens: int = 2048


@dataclass(frozen=True)
class ChatReply:
    """What came back.

    Attributes:
        text: the answer; JSON where ``mode`` says so.
        mode: how the server held it to its form.
        model: who answered, as the server says.
        finish: ``stop``; ``length`` where ``max_tokens`` cut it off; ``refusal``.
        input_tokens, output_tokens: None where the server does not count.
        cost: money paid, at the declared price.
    """

    text: str
    mode: Mode
    model: str
    finish: Literal["stop", "length", "refusal"] = "stop"
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float = 0.0


class ChatError(ProposerError):
    """A server gave no answer; the message says what it gave instead, without keys.

    Attributes:
        retry: whether the same call may succeed later.
        billed: whether it may have been paid for.
        unsupported: whether the server may not know this `Mode`.
        wait: seconds after which the server wants to be asked again; None: it did not say.
        kind: of failure, in a word or two, to be counted by.
    """

    def __init__(
        self,
        message: str,
        *,
        retry: bool = False,
        billed: bool = False,
        unsupported: bool = False,
        wait: float | None = None,
        kind: str = "other",
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry, self.billed, self.unsupported, self.wait = retry, billed, unsupported, wait


class ChatServer(Protocol):
    """One kind of server: how a question is written for it, and its answer read."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Those it knows, the one to try first coming first."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What, with the question, determines the answer: such as URL and model."""

    def exchange(self, request: ChatRequest, mode: Mode, seconds: float) -> ChatReply:
        """Ask once.

        Raises:
            ChatError: no answer within ``seconds``.
        """


class ChatClient(Protocol):
    """What proposers ask."""

    def complete(self, request: ChatRequest) -> ChatReply:
        """The answer; safe to be called by several threads.

        Raises:
            ChatError: there is none.
            metaopt.search.BudgetSpent: asking might cost more than is left.
        """


def request_key(identity: Mapping[str, str], request: ChatRequest) -> str:
    """SHA-256 of who is asked and what."""
    asked = {"server": dict(identity), "request": dataclasses.asdict(request)}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def instructed(request: ChatRequest, mode: Mode) -> tuple[Message, ...]:
    """The messages, with the form of the answer in words where it is JSON: no server tells the model the schema otherwise."""
    if mode == "grammar" or request.schema is None:
        return request.messages
    where = "in a ```json block" if mode == "text" else "and nothing else"
    words = f"Answer with one JSON object {where}. Its JSON Schema: {json.dumps(request.schema)}"
    first, *rest = request.messages
    if first.role == "system":
        return (Message("system", f"{first.content}\n\n{words}"), *rest)
    return (Message("system", words), first, *rest)


@dataclass(frozen=True)
class Price:
    """Money per million tokens, declared by the user: a price list in a program is out of date.

    Raises:
        ValueError: a price that is negative or no number.
    """

    input: float = 0.0
    output: float = 0.0

    def __post_init__(self) -> None:
        for price in (self.input, self.output):
            if not (isinstance(price, (int, float)) and 0 <= price < math.inf):
                raise ValueError(f"prices must be numbers of at least 0, in money per million tokens, got {price!r}")

    def of(self, input_tokens: int, output_tokens: int) -> Charge:
        """One call's charge."""
        money = (input_tokens * self.input + output_tokens * self.output) / 1e6
        return Charge(1, input_tokens + output_tokens, money)

    def most(self, request: ChatRequest) -> Charge:
        """What one call can cost at most: no tokenizer makes more tokens than there are bytes."""
        return self.of(_AROUND + len(json.dumps(dataclasses.asdict(request))), request.max_tokens)
