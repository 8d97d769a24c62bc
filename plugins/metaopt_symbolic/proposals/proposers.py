"""Who proposes candidates, by the names that users type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from metaopt import registry
from metaopt.search import Bandit, Budget, Ledger, Mixture, Proposer
from metaopt_symbolic.proposals.candidate import CandidateValidator, S

TAGS = ("llm", "text")
"""Of registered proposers that write texts: language models, and others."""

NO_LIMITS = Budget()


def ledger_file(directory: Path, worker: int) -> Path:
    """Where the calls of a worker's language models are written down."""
    return directory / f"ledger-{worker}.jsonl"


@contextmanager
def proposing(
    names: Sequence[str],
    validator: CandidateValidator[S],
    directory: Path,
    *,
    options: Mapping[str, Any],
    limits: Budget = NO_LIMITS,
    seed: int = 0,
    worker: int = 0,
) -> Iterator[tuple[Proposer, Ledger]]:
    """One proposer, or a mixture of several, and the ledger of their calls; in use until the context ends.

    Args:
        names: registered proposers with one of `TAGS`.
        validator: what they validate with.
        directory: of the search; calls of language models are in its `ledger_file`.
        options: of the language models.
        limits: of what these may ask and cost, by the prices in ``options``.
        seed: of proposers that draw, and of the mixture.
        worker: number of this process among those that share the search; each has a ledger, and limits, of its own.

    Raises:
        ValueError: a proposer that writes no texts, a name given twice, options that no language model takes, or money without
            prices.
    """
    tags = {name: registry.get("proposer", name).tags for name in names}
    for name in names:
        if not {*TAGS} & {*tags[name]}:
            raise ValueError(
                f"{name} writes no texts of candidates; choose from {', '.join(registered(*TAGS))}, with commas between several"
            )
    if len(tags) < len(names):
        raise ValueError(f"a proposer takes part once, got {', '.join(names)}")
    models = [name for name in names if "llm" in tags[name]]
    if not models and (options or limits != NO_LIMITS):
        raise ValueError(
            "options, calls, tokens and money are of language models; name one of them, or leave these out"
        )
    if limits.money is not None and not (options.get("price_input") or options.get("price_output")):
        raise ValueError("money is counted by prices per million tokens, got none; give price_input and price_output")
    path = ledger_file(directory, worker) if models else None
    with closing(Ledger(path, limits)) as ledger:
        asked = {"ledger": ledger, **options}
        found: list[Proposer] = [
            registry.create(
                "proposer", name, language=validator.language, validate=validator,
                **(asked if name in models else {"seed": seed}),
            )
            for name in names
        ]  # fmt: skip
        yield found[0] if len(found) == 1 else Mixture(found, Bandit([each.name for each in found], seed=seed)), ledger


def registered(*tags: str) -> list[str]:
    """Names of proposers with one of these tags."""
    return [name for name, spec in registry.specs("proposer").items() if {*tags} & {*spec.tags}]
