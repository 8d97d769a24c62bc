"""Trained weights, each with a card: how it was made, how good it is, and where it fails."""
