"""Tools: what a request offers, how models write calls, and how calls are read."""
