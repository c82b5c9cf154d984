"""What a step of decodes has to read.

A decode is bound by memory: every step reads all weights once and the KV cache of its sequences.
The share of the memory's bandwidth that it reaches says how much could still be gained.
"""

from dataclasses import dataclass

from kagami_shard.backends.base import Backend
from kagami_shard.forward.kv_cache import block_bytes


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Bytes a step reads, and bytes a second."""

    weight_bytes: int
    kv_token_bytes: int
    """KV cache of one token over all layers"""
    bandwidth: float
    """0: not measured"""


def read_cost(backend: Backend, bandwidth: float) -> ReadCost:
    """What reading the backend's model and its cache costs."""
    model = backend.model
    return ReadCost(model.weight_bytes, block_bytes(model.layers, 1, backend.dtype), bandwidth)
