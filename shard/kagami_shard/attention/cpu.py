"""Attention of a recorded step: the tape's own op does it, with the cache that is given here."""

from functools import cached_property

from torch import Tensor

from kagami_shard.attention.base import Attention, AttentionSpec, AttentionStep
from kagami_shard.attention.sdpa import SdpaAttention
from kagami_shard.batch import ForwardBatch
from kagami_shard.kv_cache import KVCache


class CpuAttention:
    """The backend of models that are a tape (`models/recorded.py`)."""

    name = "native"

    def __init__(self) -> None:
        self._torch = SdpaAttention()

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> "CpuStep":
        return CpuStep(batch, cache, self._torch)


class CpuStep:
    """A step whose layers attend inside of the tape; called from outside it attends in torch."""

    def __init__(self, batch: ForwardBatch, cache: KVCache, reference: Attention) -> None:
        self.batch = batch
        self.cache = cache
        self._reference = reference

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        return self._torch(query, key, value, spec)

    @cached_property
    def _torch(self) -> AttentionStep:
        return self._reference.prepare(self.batch, self.cache)
