"""Every metric by name, and the Prometheus text."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one finished step tells the metrics."""

    num_prefill_tokens: int
    num_decodes: int
    num_new: int
    """Sequences admitted by this step."""
    wall_s: float
    """Sent to result."""
    host_s: float
    device_s: float
    failed: bool


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The scheduler's state after a step."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    """Held by sequences, each shared block once."""
    blocks_cached: int
    """Kept by the prefix cache and held by no sequence."""
    running_tokens: int
