"""A decoder as a tape of the library's ops."""

from collections.abc import Sequence
from ctypes import addressof

import torch
from torch import Tensor

from kagami_shard.backends.native.decodes import NativeDecodes
from kagami_shard.backends.native.library import CBatch, pointer
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.native.tape import Tape
from kagami_shard.forward.batch import ForwardBatch, Queries
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.models.decoder import Decoder


class RecordedDecoder:
    """A `Model`, and the `Recording` of it. One tape computes steps of any size."""

    def __init__(self, decoder: Decoder, runtime: Runtime) -> None:
        """Takes the weights of `decoder`. If it raises `NotRecordable`, it has not taken them."""
        self.model_type: str = decoder.model_type
        self.layers: tuple[LayerShape, ...] = decoder.layers
        self.vocab_size: int = decoder.vocab_size
        self.max_positions: int = decoder.max_positions
        self.bytes_loaded: int = decoder.bytes_loaded
        self.quantization: str = decoder.quantization
        self._tape: Tape = record(decoder, runtime)
        self.weight_bytes: int = self._tape.weight_bytes
        self._logits = torch.empty(0)

    def takes(self, batch: ForwardBatch) -> bool:
        return True

    def replay(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """As `Recording` says; the next step uses the memory of the logits again."""
        logits = self._rows_of_logits(len(batch.selected_rows))
        replay_into(self._tape, batch, PageTables(cache), logits)
        return logits

    def decodes(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> NativeDecodes:
        """As `Recording` says."""
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
    """Run one step of `tape`; writes `logits`, `[num_rows, vocab_size]` float32."""
    whole = _Step(batch.queries, pages, logits)
    struct = whole.struct
    struct.input_ids, struct.positions = pointer(batch.input_ids), pointer(batch.positions)
    if batch.selected is not batch.queries:
        selected = _Step(batch.selected, pages, logits)
        selected.struct.rows = pointer(batch.selected_rows)
        struct.selected = addressof(selected.struct)
    tape.replay(struct)


class _Step:
    """`CBatch` of `queries`, with the arrays that it points to."""

    def __init__(self, queries: Queries, pages: PageTables, logits: Tensor) -> None:
        query_lens, kv_lens = torch.tensor(queries.query_lens), torch.tensor(queries.kv_lens)
        self._alive = (queries, query_lens, kv_lens)
        self.struct = CBatch(
            num_tokens=sum(queries.query_lens),
            num_sequences=len(queries.query_lens),
            num_decodes=queries.num_decodes,
            table_width=queries.block_tables.shape[1],
            block_tables=pointer(queries.block_tables),
            query_lens=pointer(query_lens),
            kv_lens=pointer(kv_lens),
            keys=pages.keys,
            values=pages.values,
            block_size=pages.cache.block_size,
            logits=pointer(logits),
        )
