"""The tensors of one step. Flat: prompt chunks and decode tokens together, no padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What the model sees of one step; sequences with a single token come first.

    `query_lens[i]` tokens of sequence i are computed in this step; after it, `kv_lens[i]` tokens
    of it lie in the cache, the computed ones last.
    """

    input_ids: Tensor
    """`[num_tokens]` int64"""
    positions: Tensor
    """`[num_tokens]` int64, of each token in its sequence"""
    slots: Tensor
    """`[num_tokens]` int64, where each token's key and value go"""
    block_tables: Tensor
    """`[num_sequences, max_blocks]` int64, padded with block 0"""
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_decodes: int
    """The first `num_decodes` sequences have one token each"""
    logits_rows: Tensor
    """`[num_rows]` int64, the tokens after which logits are wanted"""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device
