"""Bilevel problems: what can be learnt about a training run by the gradient of what it ends with (docs/bilevel-problems.md)."""
