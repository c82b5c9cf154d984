"""From a valid request to its stream of tokens: permits, the loop, text, events."""
