"""The reference backend: every model, on any device, computed by torch operation by operation."""

from collections.abc import Callable, Sequence

import torch

from kagami_proto.values import DEVICE_POLICIES, DevicePolicy
from kagami_shard.backends.base import Backend, Elapsed
from kagami_shard.backends.elapsed import CudaElapsed, HostElapsed
from kagami_shard.backends.torch.ops import TorchOps
from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.forward.output import Output, OutputKind
from kagami_shard.layers.attention import AttentionStep
from kagami_shard.machine.host_pages import HostPages
from kagami_shard.machine.memory import is_out_of_memory, pool_bytes
from kagami_shard.models.base import Model
from kagami_shard.models.decoder import Decoder
from kagami_shard.sampling.logprobs import TorchScorer

Forward = Callable[[ForwardBatch, AttentionStep, OutputKind], Output]
"""One step of a model over the attention that it is given"""

Successor = Callable[["TorchBackend", KVCache | None], Backend]
"""What `upgrade` calls: a faster backend for the same model, or the one it was given"""


class TorchBackend:
    """A `Backend`; its attention gathers pages, `sdpa.py`."""

    name = "sdpa"

    def __init__(
        self,
        model: Model,
        forward: Forward,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory_fraction: float = 1.0,
        num_ranks: int = 1,
        successor: Successor | None = None,
    ) -> None:
        """`memory_fraction` of the device's memory belongs to the ranks on it."""
        self.model = model
        self.dtype = dtype
        self.device = device
        self.memory_fraction = memory_fraction
        self.scorer = TorchScorer()
        self._forward = forward
        self._num_ranks = num_ranks
        self._successor = successor
        self._attention = SdpaAttention()

    @property
    def policy(self) -> DevicePolicy:
        return DEVICE_POLICIES[self.device.type]

    def pool_bytes(self) -> int:
        return pool_bytes(self.device, self.memory_fraction, self._num_ranks)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        return KVCache(
            self.model.layers,
            num_blocks,
            block_size,
            dtype=self.dtype,
            device=self.device,
            pages=HostPages(self.policy.cache_share) if self.device.type == "cpu" else None,
        )

    def run(self, batch: ForwardBatch, cache: KVCache, wanted: OutputKind) -> Output:
        return self._forward(batch, self._attention.prepare(batch, cache), wanted)

    def carry_on(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        """Never: a decode of this backend costs the same, whoever builds its batch."""

    def elapsed(self, started_ns: int) -> Elapsed:
        return CudaElapsed() if self.device.type == "cuda" else HostElapsed(started_ns)

    def recover(self, error: Exception) -> None:
        """A CUDA error is sticky: every later call fails too. Out of memory is none of those."""
        if is_out_of_memory(error):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        elif isinstance(error, torch.AcceleratorError):
            raise error

    def upgrade(self, cache: KVCache | None) -> Backend:
        return self if self._successor is None else self._successor(self, cache)


def run_decoder(
    decoder: Decoder, batch: ForwardBatch, attend: AttentionStep, wanted: OutputKind
) -> Output:
    """A `Forward` of our own decoder."""
    ops = TorchOps(batch, attend, decoder.ropes)
    hidden = decoder.hidden(ops)
    return Output(
        logits=decoder.logits(ops, hidden) if OutputKind.LOGITS in wanted else None,
        vectors=hidden.float() if OutputKind.VECTORS in wanted else None,
    )
