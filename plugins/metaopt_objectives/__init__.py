"""Objectives: losses of preferences, classes, numbers and policies, and weights of examples, as in the papers."""
