"""Hand-designed optimizers and wrappers."""
