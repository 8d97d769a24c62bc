"""Training problems that need no download."""
