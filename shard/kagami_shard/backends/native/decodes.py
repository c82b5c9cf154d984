"""Decodes that the library carries on: their arrays are written once, then the library moves on."""

import ctypes
from collections.abc import Sequence
from ctypes import Array, addressof, c_float, c_int64

from torch import Tensor

from kagami_shard.backends.native.library import CBatch, CDecodes, pointer
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.tape import Tape

# Blocks that a sequence can be given before a batch is built anew.
_SPARE_BLOCKS = 16


class NativeDecodes:
    """`Decodes` on a tape."""

    def __init__(
        self,
        tape: Tape,
        logits: Tensor,
        pages: PageTables,
        *,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        """`logits`, `[num_sequences, vocab_size]`, is scratch; `pages` says where the cache is."""
        num_rows, vocab_size = logits.shape
        self._tape = tape
        self._alive = (logits, pages)
        self.table_width = max(map(len, tables)) + _SPARE_BLOCKS
        self._ids = _array(last_ids)
        self._positions = _array(positions)
        self._kv_lens = _array([position + 1 for position in positions])
        self._logprobs = (c_float * num_rows)()
        self._tables = _array([0] * (num_rows * self.table_width))
        self._query_lens = _array([1] * num_rows)
        for row, blocks in enumerate(tables):
            self.grant(row, 0, blocks)
        self._struct = CDecodes(
            batch=CBatch(
                num_tokens=num_rows,
                num_sequences=num_rows,
                num_decodes=num_rows,
                table_width=self.table_width,
                input_ids=addressof(self._ids),
                positions=addressof(self._positions),
                block_tables=addressof(self._tables),
                query_lens=addressof(self._query_lens),
                kv_lens=addressof(self._kv_lens),
                keys=pages.keys,
                values=pages.values,
                block_size=pages.cache.block_size,
                logits=pointer(logits),
            ),
            ids=addressof(self._ids),
            positions=addressof(self._positions),
            kv_lens=addressof(self._kv_lens),
            logprobs=addressof(self._logprobs),
            vocab_size=vocab_size,
        )

    @property
    def sampling_ns(self) -> int:
        return int(self._struct.sampling_ns)

    def grant(self, row: int, first: int, blocks: Sequence[int]) -> None:
        begin = row * self.table_width + first
        self._tables[begin : begin + len(blocks)] = list(blocks)

    def run(self) -> int:
        """Raises MemoryError."""
        return self._tape.decode(self._struct)

    def chosen(self) -> tuple[list[int], list[float]]:
        return self._ids[:], self._logprobs[:]


def _array(values: Sequence[int]) -> "Array[c_int64]":
    return (ctypes.c_int64 * len(values))(*values)
