"""The proposer that asks a language model."""

from __future__ import annotations

import math
from pathlib import Path

from metaopt.search import Proposal, Request, Validator
from metaopt_llm.chat import ChatClient, ChatReply, ChatRequest, Message
from metaopt_llm.form import Form, ReplyError
from metaopt_llm.prompt import messages
from metaopt_llm.template_files import Templates


class LLMProposer:
    """Asks a language model, and lets it mend what is not valid.

    Args:
        client: who is asked.
        form: how candidates are written.
        validate: what is wrong with a source, for the model to mend.
        name: of the proposer.
        template: which text file asks: ``propose`` shows parents, notes and a sample of the archive; ``opro`` the best alone.
        templates: directory of text files that replace the package's.
        examples: how many elites are shown.
        repairs: how often a model may mend one candidate.
        temperature: None: the server's own.
        max_tokens: of one answer.

    Raises:
        ValueError: no template of that name, one that asks for what it cannot have, or a number out of range.
    """

    def __init__(
        self,
        client: ChatClient,
        form: Form,
        validate: Validator,
        name: str = "llm",
        template: str = "propose",
        templates: Path | str | None = None,
        examples: int = 8,
        repairs: int = 2,
        temperature: float | None = 1.0,
        max_tokens: int = 2048,
    ) -> None:
        for what, number, least in (("examples", examples, 0), ("repairs", repairs, 0), ("max_tokens", max_tokens, 1)):
            if not (isinstance(number, int) and number >= least):
                raise ValueError(f"{what} must be an integer of at least {least}, got {number!r}")
        if temperature is not None and not (isinstance(temperature, (int, float)) and 0 <= temperature < math.inf):
            raise ValueError(
                f"temperature must be a number of at least 0, or None for the server's own, got {temperature!r}"
            )
        self.name = name
        self._client, self._form, self._validate = client, form, validate
        self._template, self._templates, self._examples = template, Templates(templates), examples
        self._repairs, self._temperature, self._max_tokens = repairs, temperature, max_tokens
        self._messages(Request(0, ""))  # templates that cannot be filled are refused now, not after a day
        self._templates.fill("repair", error="")

    def propose(self, request: Request) -> Proposal:
        """One candidate: the first valid one, or the last one and what is wrong with it."""
        conversation = self._messages(request)
        replies: list[ChatReply] = []
        while True:
            reply = self._client.complete(self._asked(conversation, request.number))
            replies.append(reply)
            source, name, thought, error, unreadable = reply.text, "", "", None, False
            try:
                written = self._form.read(reply)
                source, name, thought = written.source, written.name, written.thought
                error = self._validate(source)
            except ReplyError as refused:
                error, unreadable = str(refused), True
            if error is None or len(replies) > self._repairs:
                tokens = sum((r.input_tokens or 0) + (r.output_tokens or 0) for r in replies)
                cost = sum(r.cost for r in replies)
                return Proposal(source, name, thought, self.name, reply.model, tokens, cost, error or "", unreadable)
            said = Message("assistant", reply.text or "(nothing)")  # servers refuse empty turns
            conversation = (*conversation, said, Message("user", self._templates.fill("repair", error=error)))

    def _messages(self, request: Request) -> tuple[Message, ...]:
        return messages(request, self._form, self._templates, self._template, self._examples)

    def _asked(self, conversation: tuple[Message, ...], seed: int) -> ChatRequest:
        return ChatRequest(
            conversation, self._form.schema, self._form.grammar, seed, self._temperature, self._max_tokens
        )
