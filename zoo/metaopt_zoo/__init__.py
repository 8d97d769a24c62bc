"""Trained weights and discovered programs (none yet)."""
