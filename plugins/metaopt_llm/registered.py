"""The proposers under the names that users type."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from metaopt.search import Ledger, Validator
from metaopt_llm.chat import ChatClient, Price
from metaopt_llm.client import Client, Recorded
from metaopt_llm.form import python_form
from metaopt_llm.http import require_key
from metaopt_llm.local_model import LocalServer
from metaopt_llm.proposers import LLMProposer
from metaopt_llm.servers import AnthropicServer, OpenAIServer
from metaopt_llm.template_files import Templates


def openai(
    language: str,
    validate: Validator,
    ledger: Ledger,
    model: str = "",
    base_url: str = "https://api.openai.com/v1",
    key_env: str = "OPENAI_API_KEY",
    dialect: str = "openai",
    price_input: float = 0.0,
    price_output: float = 0.0,
    **options: Any,
) -> LLMProposer:
    """A model behind any server of OpenAI's chat completions.

    Args:
        language: name of the template that describes how candidates are written, such as ``preference_loss``.
        validate: what is wrong with one.
        ledger: of the search.
        model: its name there; there is no default.
        base_url: of the server, see `metaopt_llm.servers.OpenAIServer`.
        key_env: name of the environment variable that holds the key; empty for servers without keys.
        dialect: kind of server, one of `metaopt_llm.servers.DIALECTS`.
        price_input: money per million tokens of questions.
        price_output: money per million tokens of answers.
        **options: of `metaopt_llm.proposers.LLMProposer`.

    Raises:
        ValueError: no model, an option that is unknown or out of range, or no key where the ledger allows calls.
    """
    client = Client(OpenAIServer(model, base_url, key_env, dialect), ledger, Price(price_input, price_output))
    _require_key(key_env, ledger)
    return _proposer(client, language, validate, **{"name": "openai", **options})


def anthropic(
    language: str,
    validate: Validator,
    ledger: Ledger,
    model: str = "",
    base_url: str = "https://api.anthropic.com",
    key_env: str = "ANTHROPIC_API_KEY",
    price_input: float = 0.0,
    price_output: float = 0.0,
    **options: Any,
) -> LLMProposer:
    """A model of Anthropic's; arguments as of `openai`."""
    client = Client(AnthropicServer(model, base_url, key_env), ledger, Price(price_input, price_output))
    _require_key(key_env, ledger)
    return _proposer(client, language, validate, **{"name": "anthropic", **options})


def local(
    language: str, validate: Validator, ledger: Ledger, model: Path | str | None = None, **options: Any
) -> LLMProposer:
    """A model on this machine; ``model`` as of `metaopt_llm.local_model.LocalServer`, the rest as of `openai`."""
    client = Client(LocalServer(model), ledger)
    return _proposer(client, language, validate, **{"name": "local", "max_tokens": 256, **options})


def recorded(language: str, validate: Validator, ledger: Ledger, **options: Any) -> LLMProposer:
    """The answers of a ledger in their order, whatever is asked; arguments as of `openai`."""
    return _proposer(Recorded(ledger), language, validate, **{"name": "recorded", **options})


def _require_key(key_env: str, ledger: Ledger) -> None:
    """Without calls a ledger replays what it holds, and needs no key."""
    if key_env and ledger.budget.calls != 0:
        require_key(key_env)


def _proposer(
    client: ChatClient, language: str, validate: Validator, templates: Path | str | None = None, **options: Any
) -> LLMProposer:
    known = [*inspect.signature(LLMProposer).parameters][3:]  # after client, form and validate
    for name in options.keys() - known:
        raise ValueError(
            f"{options['name']} takes no option {name!r}; beside those of its server it takes {', '.join(known)}"
        )
    form = python_form(language, Templates(templates))
    return LLMProposer(client, form, validate, templates=templates, **options)
