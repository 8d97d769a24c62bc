"""An update rule and a task of somebody else's, for metaopt."""
