"""Tools: what a request offers, how models write tool calls, and how their text is parsed."""
