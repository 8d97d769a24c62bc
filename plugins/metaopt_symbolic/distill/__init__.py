"""A learned objective or optimizer as a closed form that was verified: LPO to DPO, as a command."""
