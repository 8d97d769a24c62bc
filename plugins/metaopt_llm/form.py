"""How a model is to write its candidates, and how they are found in what it wrote."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema

from metaopt_llm.chat import ChatReply
from metaopt_llm.template_files import Templates

NAME = "^[a-z][a-z0-9_]{2,31}$"
"""Pattern of the names of candidates."""
_LONGEST_THOUGHT = 1000  # characters
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)```", re.DOTALL)
_REASONING = re.compile(r"^.*</think>", re.DOTALL)


class ReplyError(ValueError):
    """A reply with no candidate in it; the message is for its author."""


@dataclass(frozen=True)
class Written:
    """A candidate as a model wrote it: text, or JSON where it was asked for statements."""

    source: str
    name: str
    thought: str


@dataclass(frozen=True)
class Form:
    """How candidates are written.

    Attributes:
        language: name of the template that describes the language to the model.
        source: JSON Schema of a candidate's source.
        grammar: GBNF of the source alone, for servers that hold answers to grammars; it needs levels of bounded depth, because
            small models do not leave recursive rules.
    """

    language: str
    source: Mapping[str, Any]
    grammar: str | None = None

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of a reply. Lengths of strings are not in it: servers refuse or ignore them."""
        properties = {
            "thought": {
                "type": "string",
                "description": "why this candidate should be better, in one or two sentences",
            },
            "name": {"type": "string", "pattern": NAME},
            "source": dict(self.source),
        }
        return {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
        }  # fmt: skip

    def read(self, reply: ChatReply) -> Written:
        """The candidate in ``reply``, checked against the schema whatever the server promised.

        Raises:
            ReplyError: there is none.
        """
        if reply.finish == "refusal":
            raise ReplyError("the answer was a refusal")
        text = _REASONING.sub("", reply.text).strip()
        answer = _json_object(text)
        if answer is None and reply.finish == "length":
            raise ReplyError("the answer was cut off because it is too long; be shorter")
        if answer is not None:
            return self._checked(answer)
        if reply.mode == "grammar":
            return _bare(text)
        blocks = _FENCED.findall(text)
        if blocks and self.source.get("type") == "string":
            return _bare(blocks[-1].strip())
        raise ReplyError("the answer has no JSON object with thought, name and source")

    def _checked(self, answer: dict[str, Any]) -> Written:
        found = jsonschema.Draft202012Validator(self.schema).iter_errors(answer)
        error = jsonschema.exceptions.best_match(found)
        if error is not None:
            raise ReplyError(f"the answer does not fit the schema: {error.json_path}: {error.message[:300]}")
        source = answer["source"]
        text = source if isinstance(source, str) else json.dumps(source)
        return Written(text, answer["name"], answer["thought"][:_LONGEST_THOUGHT])


def _json_object(text: str) -> dict[str, Any] | None:
    for candidate in (text, *reversed(_FENCED.findall(text))):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _bare(source: str) -> Written:
    return Written(source, f"candidate_{hashlib.sha256(source.encode()).hexdigest()[:8]}", "")


def python_form(language: str, templates: Templates) -> Form:
    """Candidates as Python text, which the template ``LANGUAGE.txt`` describes and ``LANGUAGE.gbnf``, if there is one, holds.

    Args:
        language: ``preference_loss``, ``rule``, or the name of a file of one's own.
        templates: the text files.

    Raises:
        ValueError: there is no such description.
    """
    templates.text(f"{language}.txt")
    source = {"type": "string", "description": "the Python function"}
    return Form(language, source, templates.find(f"{language}.gbnf"))
