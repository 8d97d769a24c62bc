"""Language models as proposers of losses and update rules."""
