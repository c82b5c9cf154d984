"""A decoder as a tape: what runs on a CPU with the library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kagami_shard.attention.base import AttentionStep
from kagami_shard.attention.cpu import CpuStep
from kagami_shard.batch import ForwardBatch
from kagami_shard.graphs import Tape, record
from kagami_shard.kv_cache import KVCache, LayerShape
from kagami_shard.models.decoder import Decoder
from kagami_shard.native.decodes import NativeDecodes
from kagami_shard.native.library import CBatch, pointer
from kagami_shard.native.page_tables import PageTables
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
        logits = self._rows_of_logits(len(batch.logits_rows))
        replay_into(self._tape, batch, PageTables(attend.cache), logits)
        return logits

    def decodes(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> NativeDecodes:
        """As `greedy_batch.GreedyModel` says."""
        return NativeDecodes(
            self._tape,
            self._rows_of_logits(len(last_ids)),
            PageTables(cache),
            last_ids=last_ids,
            positions=positions,
            tables=tables,
        )

    def _rows_of_logits(self, num_rows: int) -> Tensor:
        size = num_rows * self.vocab_size
        if len(self._logits) < size:
            self._logits = torch.empty(size)
        return self._logits[:size].view(num_rows, self.vocab_size)


def replay_into(tape: Tape, batch: ForwardBatch, pages: PageTables, logits: Tensor) -> None:
    """One step of `tape`, its logits into `logits`, `[num_rows, vocab_size]` float32."""
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
            keys=pages.keys,
            values=pages.values,
            block_size=pages.cache.block_size,
            logits=pointer(logits),
        )
    )
