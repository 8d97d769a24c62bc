"""Learned optimizers and gradient estimators of meta-training."""
