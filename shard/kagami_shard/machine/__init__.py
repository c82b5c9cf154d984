"""The machine: its memory, bandwidth, devices, limits, and the ranks of one model."""
