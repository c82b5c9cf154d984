"""Runs steps: the worker thread, the sequences in memory, sampling, results."""
