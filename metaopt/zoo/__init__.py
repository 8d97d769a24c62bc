"""Published rules and losses, with cards that say how they were made, how good they are, and where they fail."""

from metaopt.zoo.card import CARD_FILE, Card, LossCard, ProgramCard, WeightsCard, entries, read_card, render

__all__ = ["CARD_FILE", "Card", "LossCard", "ProgramCard", "WeightsCard", "entries", "read_card", "render"]
