"""Metrics and the spans of a request."""
