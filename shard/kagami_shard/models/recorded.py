"""A decoder as a tape: what runs on a CPU with the library."""

from collections.abc import Sequence
from ctypes import Array, addressof, c_void_p

import torch
from torch import Tensor

from kagami_shard.attention.base import AttentionStep
from kagami_shard.attention.cpu import CpuStep
from kagami_shard.batch import ForwardBatch
from kagami_shard.graphs import Tape, record
from kagami_shard.kv_cache import LayerShape
from kagami_shard.models.decoder import Decoder
from kagami_shard.native.library import CBatch, pointer
from kagami_shard.native.runtime import Runtime


class RecordedDecoder:
    """A `Model`. Its logits are valid until the next step: their memory is used again."""

    def __init__(self, decoder: Decoder, runtime: Runtime) -> None:
        """Takes the weights of `decoder`. Raises `NotRecordable`, and then does not."""
        self.model_type: str = decoder.model_type
        self.layers: tuple[LayerShape, ...] = decoder.layers
        self.vocab_size: int = decoder.vocab_size
        self.max_positions: int = decoder.max_positions
        self.bytes_loaded: int = decoder.bytes_loaded
        self.quantization: str = decoder.quantization
        self._tape: Tape = record(decoder, runtime)
        self._logits = torch.empty(0)

    def forward(self, batch: ForwardBatch, attend: AttentionStep) -> Tensor:
        assert isinstance(attend, CpuStep), "a tape attends by itself"
        num_rows, size = len(batch.logits_rows), self.vocab_size
        if len(self._logits) < num_rows * size:
            self._logits = torch.empty(num_rows * size)
        logits = self._logits[: num_rows * size].view(num_rows, size)
        replay_into(self._tape, batch, attend, logits)
        return logits


def replay_into(tape: Tape, batch: ForwardBatch, attend: CpuStep, logits: Tensor) -> None:
    """One step of `tape`, its logits into `logits`, `[num_rows, vocab_size]` float32."""
    cache = attend.cache
    keys, values = page_table(cache.keys), page_table(cache.values)
    query_lens, kv_lens = torch.tensor(batch.query_lens), torch.tensor(batch.kv_lens)
    tape.replay(
        CBatch(
            num_tokens=batch.num_tokens,
            num_rows=len(batch.logits_rows),
            num_sequences=len(batch.query_lens),
            num_decodes=batch.num_decodes,
            table_width=batch.block_tables.shape[1],
            input_ids=pointer(batch.input_ids),
            positions=pointer(batch.positions),
            rows=pointer(batch.logits_rows),
            block_tables=pointer(batch.block_tables),
            query_lens=pointer(query_lens),
            kv_lens=pointer(kv_lens),
            keys=addressof(keys),
            values=addressof(values),
            block_size=cache.block_size,
            logits=pointer(logits),
        )
    )


def page_table(tensors: Sequence[Tensor]) -> "Array[c_void_p]":
    """The addresses of a cache's layers."""
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
