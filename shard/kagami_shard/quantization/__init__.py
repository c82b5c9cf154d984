"""Weights in fewer bits: schemes made at load, and checkpoints that come quantized."""
