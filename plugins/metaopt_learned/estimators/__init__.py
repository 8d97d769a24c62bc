"""Gradient estimators: how a meta-gradient is got from training runs. docs/estimators.md compares them."""
