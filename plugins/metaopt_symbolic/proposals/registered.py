"""The mutators under the name that users type."""

from __future__ import annotations

from typing import Any

from metaopt.search import Validator
from metaopt_symbolic.losses.mutator import LossMutator
from metaopt_symbolic.proposals.mutator import Mutator
from metaopt_symbolic.rules.mutator import RuleMutator


def mutator(language: str, validate: Validator, **options: Any) -> Mutator:
    """The mutator of a kind of candidates.

    Args:
        language: ``preference_loss`` or ``rule``.
        validate: what is wrong with one.
        **options: of `LossMutator` or of `RuleMutator`.

    Raises:
        ValueError: candidates of another kind.
    """
    kinds: dict[str, type[LossMutator] | type[RuleMutator]] = {"preference_loss": LossMutator, "rule": RuleMutator}
    if language not in kinds:
        raise ValueError(f"what is mutated must be one of {', '.join(kinds)}, got {language!r}")
    return kinds[language](validate, **options)
