"""Paged attention in plain torch: gather the blocks, then scaled dot-product attention.

The reference that every other backend is tested against; it runs on any device. Decodes are one
padded batch with the heads of a KV group folded into query rows, so that each key and value is
read once (m: 6x faster than `enable_gqa` for 16 bf16 sequences on a CPU). Each prompt chunk is a
call of its own: lengths differ too much to pad.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from kagami_shard.attention.base import AttentionSpec, AttentionStep
from kagami_shard.batch import ForwardBatch
from kagami_shard.kv_cache import KVCache


class SdpaAttention:
    """The torch backend."""

    name = "sdpa"

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> AttentionStep:
        return _SdpaStep(batch, cache)


class _SdpaStep:
    """One step; masks and gather indices are made once and shared by the layers."""

    def __init__(self, batch: ForwardBatch, cache: KVCache) -> None:
        self._batch = batch
        self._cache = cache
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        device = batch.device
        self._num_decodes = batch.num_decodes
        self._decode_lens = torch.tensor(batch.kv_lens[: self._num_decodes], device=device)
        max_len = max(batch.kv_lens[: self._num_decodes], default=0)
        num_blocks = -(-max_len // cache.block_size)
        self._decode_width = num_blocks * cache.block_size
        self._decode_blocks = batch.block_tables[: self._num_decodes, :num_blocks].flatten()
        self._scratch: dict[tuple[str, int, torch.Size], Tensor] = {}
        self._chunks: list[_Chunk] = []
        start = self._num_decodes
        for index in range(self._num_decodes, len(batch.query_lens)):
            length, kv_len = batch.query_lens[index], batch.kv_lens[index]
            blocks = batch.block_tables[index, : -(-kv_len // cache.block_size)]
            self._chunks.append(_Chunk(start, length, kv_len, blocks))
            start += length

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        self._cache.write(spec.layer, self._batch.slots, key, value)
        output = query.new_empty((*query.shape[:2], value.shape[-1]))
        keys, values = self._cache.keys[spec.layer], self._cache.values[spec.layer]
        if self._num_decodes:
            output[: self._num_decodes] = self._decode(
                query[: self._num_decodes], keys, values, spec
            )
        for number, chunk in enumerate(self._chunks):
            rows = slice(chunk.start, chunk.start + chunk.length)
            output[rows] = self._prefill(number, query[rows], keys, values, spec)
        return output

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
        batch_size, num_heads, head_dim = query.shape
        num_kv_heads = keys.shape[2]
        # [batch * blocks, block_size, kv_heads, dim] -> [batch, kv_heads, tokens, dim]
        gathered_keys = self._gather("keys", keys, self._decode_blocks)
        gathered_keys = gathered_keys.view(batch_size, -1, *keys.shape[2:]).transpose(1, 2)
        gathered_values = self._gather("values", values, self._decode_blocks)
        gathered_values = gathered_values.view(batch_size, -1, *values.shape[2:]).transpose(1, 2)
        folded = query.view(batch_size, num_kv_heads, num_heads // num_kv_heads, head_dim)
        mask = self._decode_mask(spec.window, query.dtype)
        output = _attend(folded, gathered_keys, gathered_values, mask, spec)
        return output.reshape(batch_size, num_heads, values.shape[-1])

    def _prefill(
        self, number: int, query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec
    ) -> Tensor:
        chunk = self._chunks[number]
        num_heads, num_kv_heads = query.shape[1], keys.shape[2]
        group = num_heads // num_kv_heads
        # The KV heads are the batch, the heads of a group share its keys without a copy.
        gathered_keys = self._gather("keys", keys, chunk.blocks)
        gathered_keys = gathered_keys.flatten(0, 1)[: chunk.kv_len].transpose(0, 1)
        gathered_values = self._gather("values", values, chunk.blocks)
        gathered_values = gathered_values.flatten(0, 1)[: chunk.kv_len].transpose(0, 1)
        grouped = query.view(chunk.length, num_kv_heads, group, -1).permute(1, 2, 0, 3)
        mask = self._prefill_mask(number, spec.window, query.dtype)
        output = _attend(
            grouped,
            gathered_keys[:, None].expand(-1, group, -1, -1),
            gathered_values[:, None].expand(-1, group, -1, -1),
            mask,
            spec,
            per_group=True,
        )
        return output.permute(2, 0, 1, 3).reshape(chunk.length, num_heads, values.shape[-1])

    def _gather(self, name: str, pages: Tensor, blocks: Tensor) -> Tensor:
        """`pages[blocks]`, into memory that every layer of the step uses again.

        On a CPU half of the time of plain indexing goes into page faults of a fresh result, and
        most of the rest into copying element by element (m: 5.4 ms against 0.16 for 7 MB).
        """
        key = (name, len(blocks), pages.shape)
        if (scratch := self._scratch.get(key)) is None:
            scratch = pages.new_empty((len(blocks), pages[0].numel()))
            self._scratch[key] = scratch
        torch.index_select(pages.flatten(1), 0, blocks, out=scratch)
        return scratch.view(len(blocks), *pages.shape[1:])

    def _decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[num_decodes, 1, 1, max_len]`, 0 where a token is seen and -inf elsewhere."""
        if (mask := self._masks.get((-1, window, dtype))) is None:
            position = torch.arange(self._decode_width, device=self._decode_lens.device)[None]
            seen = position < self._decode_lens[:, None]
            if window is not None:
                seen &= position >= self._decode_lens[:, None] - window
            mask = _additive(seen, dtype)[:, None, None]
            self._masks[-1, window, dtype] = mask
        return mask

    def _prefill_mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[chunk, kv_len]`, causal: the chunk's tokens are the last of the sequence."""
        if (mask := self._masks.get((number, window, dtype))) is None:
            chunk = self._chunks[number]
            device = self._decode_lens.device
            of_key = torch.arange(chunk.kv_len, device=device)[None]
            of_query = torch.arange(chunk.kv_len - chunk.length, chunk.kv_len, device=device)[
                :, None
            ]
            seen = of_key <= of_query
            if window is not None:
                seen &= of_key > of_query - window
            mask = _additive(seen, dtype)
            self._masks[number, window, dtype] = mask
        return mask


class _Chunk:
    """One prompt chunk: `length` tokens of the batch from `start` on, `kv_len` in the cache."""

    __slots__ = ("blocks", "kv_len", "length", "start")

    def __init__(self, start: int, length: int, kv_len: int, blocks: Tensor) -> None:
        self.start = start
        self.length = length
        self.kv_len = kv_len
        self.blocks = blocks


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    spec: AttentionSpec,
    *,
    per_group: bool = False,
) -> Tensor:
    """Attend with `[batch, rows, queries, dim]`; softcap and sinks need the scores in the open.

    Decodes come as `[sequences, kv_heads, group, dim]`, chunks (`per_group`) as
    `[kv_heads, group, chunk, dim]`; it decides where the heads of `sinks` lie.
    """
    if spec.softcap is None and spec.sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=spec.scale)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores + mask
    if spec.sinks is None:
        weights = softmax(scores, dim=-1)
    else:
        sinks = spec.sinks.float()
        if per_group:
            sinks = sinks.view(query.shape[0], query.shape[1], 1, 1)
        else:
            sinks = sinks.view(1, query.shape[1], query.shape[2], 1)
        sinks = sinks.expand(*scores.shape[:-1], 1)
        weights = softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)
