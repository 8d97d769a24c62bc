"""Meta-training: inner problems, gradient estimators, and the trainer."""
