"""What this plugin offers: language models as sources of candidates."""

from __future__ import annotations

from metaopt.hookspecs import Spec, hookimpl


@hookimpl
def metaopt_proposers() -> list[Spec]:
    """One spec for each name that a user may type."""
    place = "metaopt_llm.registered"
    paper = "Lu et al., 2024, https://arxiv.org/abs/2406.08414"
    return [
        Spec(
            "openai", f"{place}:openai", "a model behind any server of OpenAI's chat completions: hosted, vLLM, Ollama",
            ("llm",), paper, extra="llm",
        ),
        Spec("anthropic", f"{place}:anthropic", "a model of Anthropic's", ("llm",), paper, extra="llm"),
        Spec("local", f"{place}:local", "a small model on this machine, by llama.cpp", ("llm",), paper, extra="local-llm"),
        Spec(
            "opro", f"{place}:openai", "as openai, shown the best candidates in ascending order and nothing else",
            ("llm", "control"), "Yang et al., 2023, https://arxiv.org/abs/2309.03409", {"template": "opro", "name": "opro"},
            extra="llm",
        ),
        Spec("recorded", f"{place}:recorded", "answers of an earlier search, for tests", ("llm",), paper, extra="llm"),
    ]  # fmt: skip
