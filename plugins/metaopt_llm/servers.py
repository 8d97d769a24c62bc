"""How each kind of server is asked: those that speak OpenAI's chat completions, and Anthropic's messages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metaopt.search.keys import require_key_name
from metaopt_llm.chat import ChatError, ChatReply, ChatRequest, Mode, instructed
from metaopt_llm.http import key_auth, post_json, require_url


@dataclass(frozen=True)
class Dialect:
    """What servers that all call themselves compatible with OpenAI's differ in.

    Attributes:
        modes: that they know, the strictest first.
        max_tokens: name of the field.
        seed: whether they take one.
    """

    modes: tuple[Mode, ...]
    max_tokens: str = "max_tokens"
    seed: bool = True


DIALECTS: Mapping[str, Dialect] = {
    # Seeds are deprecated there, and reasoning models take no other name for the limit.
    "openai": Dialect(("json_schema", "json_object", "text"), "max_completion_tokens", seed=False),
    "vllm": Dialect(("grammar", "json_schema", "json_object", "text")),
    "llama.cpp": Dialect(("grammar", "json_schema", "json_object", "text")),
    "ollama": Dialect(("json_schema", "json_object", "text")),
    "other": Dialect(("json_schema", "json_object", "text"), seed=False),
}
"""Kind of server -> what it knows. Where it answers 400, 422 or 501 all the same, the next mode is tried."""


@dataclass(frozen=True)
class OpenAIServer:
    """A server of ``/chat/completions``: hosted, vLLM, llama.cpp, Ollama, or a proxy before others.

    Args:
        model: its name there.
        base_url: up to and without ``/chat/completions``.
        key_env: name of the environment variable that holds the key; empty for servers without keys.
        dialect: one of `DIALECTS`.

    Raises:
        ValueError: no model, an unknown dialect, a URL that is none or holds a password, a key_env that
            `metaopt.search.keys` refuses.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    dialect: str = "openai"

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect must be one of {list(DIALECTS)}, got {self.dialect!r}")
        _check(self.model, self.base_url, self.key_env)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Those of the dialect."""
        return DIALECTS[self.dialect].modes

    @property
    def identity(self) -> Mapping[str, str]:
        """URL and model."""
        return {"url": self.base_url, "model": self.model}

    def exchange(self, request: ChatRequest, mode: Mode, seconds: float) -> ChatReply:
        """Ask once; see `metaopt_llm.chat.ChatServer`."""
        dialect = DIALECTS[self.dialect]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dataclasses.asdict(message) for message in instructed(request, mode)],
            dialect.max_tokens: request.max_tokens,
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if dialect.seed:
            body["seed"] = request.seed
        if mode == "grammar":
            body |= (
                {"structured_outputs": {"grammar": request.grammar}}
                if self.dialect == "vllm"
                else {"grammar": request.grammar}
            )
        elif mode == "json_schema":
            schema = {"name": "proposal", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif mode == "json_object":
            body["response_format"] = {"type": "json_object"}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        answer = post_json(url, body, seconds, key_auth(self.key_env, "Authorization", "Bearer "))
        try:
            choice = answer["choices"][0]
            message, usage = choice["message"], answer.get("usage") or {}
            text, reason = message.get("content") or "", choice.get("finish_reason")
            refused = bool(message.get("refusal")) or reason == "content_filter"
            return ChatReply(
                _text(text), mode, str(answer.get("model") or self.model), _finish(reason == "length", refused),
                _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"),
            )  # fmt: skip
        except (LookupError, TypeError, AttributeError) as error:
            raise _unreadable(url, error) from None


@dataclass(frozen=True)
class AnthropicServer:
    """Anthropic's ``/v1/messages``, where a tool's schema is what holds an answer to its form.

    Their layer compatible with OpenAI's ignores ``response_format`` and ``seed`` (their documentation).

    Args:
        model: its name there.
        base_url: up to and without ``/v1/messages``.
        key_env: name of the environment variable that holds the key.

    Raises:
        ValueError: no model, a URL that is none or holds a password, a key_env that `metaopt.search.keys` refuses.
    """

    model: str
    base_url: str = "https://api.anthropic.com"
    key_env: str = "ANTHROPIC_API_KEY"

    def __post_init__(self) -> None:
        _check(self.model, self.base_url, self.key_env)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """By a tool, or in words."""
        return ("json_schema", "text")

    @property
    def identity(self) -> Mapping[str, str]:
        """URL and model."""
        return {"url": self.base_url, "model": self.model}

    def exchange(self, request: ChatRequest, mode: Mode, seconds: float) -> ChatReply:
        """Ask once; see `metaopt_llm.chat.ChatServer`."""
        messages = request.messages if mode == "json_schema" else instructed(request, mode)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "system": "\n\n".join(message.content for message in messages if message.role == "system"),
            "messages": [dataclasses.asdict(message) for message in messages if message.role != "system"],
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if mode == "json_schema":
            tool = {"name": "propose", "description": "Hand in the proposal.", "input_schema": request.schema}
            body |= {"tools": [tool], "tool_choice": {"type": "tool", "name": "propose"}}
        url = f"{self.base_url.rstrip('/')}/v1/messages"
        auth = key_auth(self.key_env, "x-api-key")
        answer = post_json(url, body, seconds, auth, {"anthropic-version": "2023-06-01"})
        try:
            blocks, usage, reason = answer["content"], answer.get("usage") or {}, answer.get("stop_reason")
            inputs = [json.dumps(block["input"]) for block in blocks if block["type"] == "tool_use"]
            text = inputs[0] if inputs else "".join(block["text"] for block in blocks if block["type"] == "text")
            asked = [_count(usage, f"{kind}input_tokens") for kind in ("", "cache_creation_", "cache_read_")]
            return ChatReply(
                text, mode, str(answer.get("model") or self.model), _finish(reason == "max_tokens", reason == "refusal"),
                sum(n or 0 for n in asked) if asked[0] is not None else None, _count(usage, "output_tokens"),
            )  # fmt: skip
        except (LookupError, TypeError, AttributeError) as error:
            raise _unreadable(url, error) from None


def _check(model: str, base_url: str, key_env: str) -> None:
    if not (isinstance(model, str) and model):
        raise ValueError(f"model must be the name of a model of {base_url}, got {model!r}; give model=NAME")
    require_url(base_url)
    if key_env:
        require_key_name(key_env)


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return content


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    count = usage.get(name)
    return count if isinstance(count, int) and count >= 0 else None


def _finish(cut: bool, refused: bool) -> Literal["stop", "length", "refusal"]:
    return "refusal" if refused else "length" if cut else "stop"


def _unreadable(url: str, error: Exception) -> ChatError:
    return ChatError(f"{url} answered JSON of another form: {error!r}", retry=True, billed=True, kind="another form")
