"""Symbolic discovery: search over programs that are optimizers."""
