"""The tensors of one step. Flat: prompt chunks and decode tokens together, no padding."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from kagami_shard.machine.device import to_device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queries:
    """Tokens that attend: runs of neighbours of one sequence, single tokens first.

    Run i is the last `query_lens[i]` of the first `kv_lens[i]` tokens of its sequence.
    """

    block_tables: Tensor
    """`[num_runs, max_blocks]` int64, padded with block 0"""
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_decodes: int
    """The first `num_decodes` runs have one token each"""

    def at(self, rows: Sequence[int]) -> "Queries":
        """The tokens at `rows`, in that order; `self` if these are all tokens in their order."""
        ends = list(accumulate(self.query_lens))
        if list(rows) == list(range(sum(self.query_lens))):
            return self
        owners: list[int] = []
        query_lens: list[int] = []
        kv_lens: list[int] = []
        for row in rows:
            owner = bisect_right(ends, row)
            kv_len = self.kv_lens[owner] - (ends[owner] - 1 - row)
            if owners and owners[-1] == owner and kv_lens[-1] == kv_len - 1:
                query_lens[-1] += 1
                kv_lens[-1] = kv_len
            else:
                owners.append(owner)
                query_lens.append(1)
                kv_lens.append(kv_len)
        sequences = to_device(owners, dtype=torch.int64, device=self.block_tables.device)
        return Queries(
            block_tables=self.block_tables.index_select(0, sequences),
            query_lens=tuple(query_lens),
            kv_lens=tuple(kv_lens),
            num_decodes=sum(1 for _ in takewhile(lambda count: count == 1, query_lens)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """What the model sees of one step."""

    input_ids: Tensor
    """`[num_tokens]` int64"""
    positions: Tensor
    """`[num_tokens]` int64, of each token in its sequence"""
    slots: Tensor
    """`[num_tokens]` int64, where each token's key and value go"""
    queries: Queries
    """All tokens, a run for each sequence"""
    selected_rows: Tensor
    """`[num_rows]` int64, the tokens after which logits or vectors are wanted"""
    selected: Queries
    """The tokens at those rows. Beside keys and values the last layer computes nothing else. It is
    `queries` itself if all tokens are selected, in order"""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device
