"""The proposers: one that asks a language model, and a mixture of any."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from metaopt.search import Proposal, Proposer, ProposerError, Request, Validator
from metaopt_llm.bandit import Bandit
from metaopt_llm.chat import ChatClient, ChatReply, ChatRequest, Message
from metaopt_llm.form import Form, ReplyError
from metaopt_llm.ledger import BudgetSpent
from metaopt_llm.prompt import messages
from metaopt_llm.template_files import Templates

_LOG = logging.getLogger("metaopt")


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
        if examples < 0 or repairs < 0 or max_tokens < 1 or not (temperature is None or temperature >= 0):
            raise ValueError(
                f"examples, repairs and temperature must be at least 0 and max_tokens at least 1, got {examples}, {repairs}, "
                f"{temperature} and {max_tokens}"
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
            source, name, thought, error = reply.text, "", "", None
            try:
                written = self._form.read(reply)
                source, name, thought = written.source, written.name, written.thought
                error = self._validate(source)
            except ReplyError as refused:
                error = str(refused)
            if error is None or len(replies) > self._repairs:
                tokens = sum((r.input_tokens or 0) + (r.output_tokens or 0) for r in replies)
                cost = sum(r.cost for r in replies)
                return Proposal(source, name, thought, self.name, reply.model, tokens, cost, error or "")
            said = Message("assistant", reply.text or "(nothing)")  # servers refuse empty turns
            conversation = (*conversation, said, Message("user", self._templates.fill("repair", error=error)))

    def _messages(self, request: Request) -> tuple[Message, ...]:
        return messages(request, self._form, self._templates, self._template, self._examples)

    def _asked(self, conversation: tuple[Message, ...], seed: int) -> ChatRequest:
        return ChatRequest(
            conversation, self._form.schema, self._form.grammar, seed, self._temperature, self._max_tokens
        )


class Mixture:
    """Several proposers, of which a bandit chooses; where one fails, another is asked.

    Args:
        proposers: of different names.
        bandit: over these names; None: one with its defaults.
        name: of the mixture.
    """

    def __init__(self, proposers: Sequence[Proposer], bandit: Bandit | None = None, name: str = "mixture") -> None:
        self.name = name
        self._proposers = {proposer.name: proposer for proposer in proposers}
        self.bandit = bandit or Bandit([proposer.name for proposer in proposers])
        self._spent: set[str] = set()

    def choose(self, request: Request) -> Request:
        """``request`` with the proposer that shall answer it: what a search writes down before it asks."""
        return dataclasses.replace(request, proposer=self.bandit.choose(self._left()))

    def propose(self, request: Request) -> Proposal:
        """One candidate, of ``request.proposer`` or, where none is named, of whom the bandit chooses.

        Raises:
            ProposerError: all of them failed.
        """
        failed: list[str] = []
        name = request.proposer or self.bandit.choose(self._left())
        while True:
            try:
                return self._proposers[name].propose(request)
            except ProposerError as error:
                failed.append(name)
                if isinstance(error, BudgetSpent):
                    self._spent.add(name)
                else:
                    self.bandit.tell(name, 0.0, 0.0)
                left = [other for other in self._left() if other not in failed]
                if not left:
                    raise
                _LOG.warning("proposer %s failed, another one is asked: %s", name, error)
                name = self.bandit.choose(left)

    def tell(self, request: Request, proposal: Proposal, score: float | None) -> None:
        """What a proposal was worth.

        Args:
            request: what it answers.
            proposal: of this mixture.
            score: the smaller the better; None, or no finite number: it was not valid, or could not be judged.
        """
        parents = [elite.score for elite in request.parents or request.elites]
        improvement = min(parents) - score if parents and score is not None and math.isfinite(score) else 0.0
        self.bandit.tell(proposal.proposer, improvement, proposal.cost)

    def _left(self) -> list[str]:
        return [name for name in self._proposers if name not in self._spent] or list(self._proposers)
