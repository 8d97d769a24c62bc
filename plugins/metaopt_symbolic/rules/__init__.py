"""Update rules that proposers write: how they are read, judged and shown."""
