"""Attention of a recorded step: the tape's own op does it, with the cache that is given here."""

from torch import Tensor

from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.layers.attention import AttentionSpec


class CpuAttention:
    """The backend of models that are a tape (`backends/native/model.py`)."""

    name = "native"

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> "CpuStep":
        return CpuStep(cache)


class CpuStep:
    """A step whose layers attend inside of the tape.

    Nobody else can: the cache may lie in an order that only the library reads.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        raise _no_tape()

    def write(self, key: Tensor, value: Tensor, spec: AttentionSpec) -> None:
        raise _no_tape()

    def attend(self, query: Tensor, spec: AttentionSpec) -> Tensor:
        raise _no_tape()

    def kept(self) -> "CpuStep":
        raise _no_tape()


def _no_tape() -> TypeError:
    return TypeError("a model that is no tape cannot attend to a tape's cache")
