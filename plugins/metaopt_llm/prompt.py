"""From a request to the messages of a chat: the words are in text files, of which users may have their own."""

from __future__ import annotations

from collections.abc import Iterable

from metaopt.search import Elite, Request
from metaopt_llm.chat import Message
from metaopt_llm.form import Form
from metaopt_llm.template_files import Templates

_LONGEST_NOTE = 600  # characters; a traceback's end says what happened


def messages(request: Request, form: Form, templates: Templates, template: str, examples: int) -> tuple[Message, ...]:
    """The conversation that asks for one candidate.

    Args:
        request: what is asked.
        form: how candidates are written.
        templates: the text files.
        template: which of them asks.
        examples: how many elites are shown, the best of them; the best comes last, where models heed it most (OPRO, Yang et
            al., 2023, https://arxiv.org/abs/2309.03409).
    """
    best = sorted(request.elites, key=lambda elite: elite.score)[:examples]
    system = templates.fill("system", goal=request.goal, language=templates.text(f"{form.language}.txt").strip())
    asked = templates.fill(
        template,
        archive=_candidates(reversed(best)) or "(none yet)",
        parents=_candidates(sorted(request.parents, key=lambda elite: -elite.score)) or "(none)",
        notes="\n".join(_quoted(note) for note in request.notes) or "(none)",
        length=f"At most {request.longest} statements."
        if request.longest
        else "Of two equally good ones the shorter wins.",
    )
    return (Message("system", system), Message("user", asked))


def _candidates(elites: Iterable[Elite]) -> str:
    return "\n\n".join(_candidate(elite) for elite in elites)


def _candidate(elite: Elite) -> str:
    scores = ", ".join(f"{task} {score:.4g}" for task, score in elite.scores.items())
    title = f"{elite.facts.get('name', elite.digest)}: score {elite.score:.4g}" + (f" ({scores})" if scores else "")
    return f"{title}\n```\n{elite.text.strip()}\n```"


def _quoted(note: str) -> str:
    """Marked line by line, so that nothing in it ends the quotation."""
    shown = note if len(note) <= _LONGEST_NOTE else "..." + note[-_LONGEST_NOTE:]
    return "\n".join(f"> {line}" for line in shown.splitlines())
