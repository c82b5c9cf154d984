"""The native backend: a recorded step of a CPU, replayed in one call."""

from collections.abc import Sequence

import torch

from kagami_proto.values import DEVICE_POLICIES
from kagami_shard.backends.base import Decodes, Recording
from kagami_shard.backends.elapsed import HostElapsed
from kagami_shard.backends.native.model import RecordedDecoder
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.forward.output import Output, OutputKind
from kagami_shard.machine.host_pages import HostPages
from kagami_shard.machine.memory import pool_bytes


class NativeBackend:
    """A `Backend`. The cache lies in an order that only the library reads."""

    name = "native"
    policy = DEVICE_POLICIES["cpu"]
    device = torch.device("cpu")
    dtype = torch.bfloat16

    def __init__(
        self, model: RecordedDecoder, runtime: Runtime, *, memory_fraction: float = 1.0
    ) -> None:
        """`runtime` is the one that `model` was recorded for."""
        self.model = model
        self._recording: Recording = model
        self.scorer = runtime
        self._memory_fraction = memory_fraction

    def pool_bytes(self) -> int:
        return pool_bytes(self.device, self._memory_fraction, 1)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        return KVCache(
            self.model.layers,
            num_blocks,
            block_size,
            dtype=self.dtype,
            device=self.device,
            pages=HostPages(self.policy.cache_share),
        )

    def run(self, batch: ForwardBatch, cache: KVCache, wanted: OutputKind) -> Output:
        """The tape ends with the head, so it gives logits and nothing else."""
        if wanted is not OutputKind.LOGITS:
            raise NotImplementedError("the native backend computes logits, and no vectors")
        return Output(logits=self._recording.replay(batch, cache))

    def carry_on(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> Decodes:
        return self._recording.decodes(cache, last_ids, positions, tables)

    def elapsed(self, started_ns: int) -> HostElapsed:
        return HostElapsed(started_ns)

    def recover(self, error: Exception) -> None:
        """A CPU is always ready for the next step."""

    def upgrade(self, cache: KVCache | None) -> "NativeBackend":
        return self
