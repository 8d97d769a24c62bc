"""Published rules: weights or a program, with a card that says how they were made, how good they are, and where they fail."""

from metaopt.zoo.card import CARD_FILE, Card, ProgramCard, WeightsCard, entries, read_card, render

__all__ = ["CARD_FILE", "Card", "ProgramCard", "WeightsCard", "entries", "read_card", "render"]
