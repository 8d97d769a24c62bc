"""Search by proposers of texts: losses and update rules, written by language models and mutators."""
