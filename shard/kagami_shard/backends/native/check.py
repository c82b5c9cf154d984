"""The library against torch at load: every operation of a decoder over a small step with chunks.

A compiler's bug, a processor's, or a library of another build must not make wrong tokens quietly.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import silu

from kagami_shard.backends.native.model import replay_into
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.native.tape import Tape
from kagami_shard.backends.torch.ops import TorchOps
from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.forward.batch import ForwardBatch, Queries
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.layers.attention import AttentionSpec
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear
from kagami_shard.layers.mlp import GatedMLP
from kagami_shard.layers.norm import RMSNorm, no_norm
from kagami_shard.layers.rotary import RopeSpec, RotaryEmbedding
from kagami_shard.models.ops import Ops, SelfAttention, T

_HEADS, _KV_HEADS, _DIM, _WIDTH, _VOCAB = 6, 2, 32, 96, 80
_BLOCKS = (8, 32)
"""Sizes of the cache's blocks: in torch's order, and as panels (`cache.h`)"""
_TOLERANCE = 0.05
"""Of the largest logit: rounding to bf16 between the ops makes 0.01"""


class _Sample:
    """One random layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            values: torch.Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            return values.bfloat16().to(dtype)

        heads = (_HEADS + 2 * _KV_HEADS) * _DIM
        self._embedding = Embedding(random(_VOCAB, _WIDTH))
        self._qkv = Linear(random(heads, _WIDTH))
        self._output = Linear(random(_WIDTH, _HEADS * _DIM), random(_WIDTH))
        self._mlp = GatedMLP(Linear(random(128, _WIDTH)), Linear(random(_WIDTH, 64)), silu)
        self._norm = RMSNorm(random(_WIDTH), 1e-5, center=1.0)
        self._head = Head(Linear(random(_VOCAB, _WIDTH)), _VOCAB)
        self.ropes = [RotaryEmbedding(RopeSpec(_DIM, 1e4, 64, 64), torch.device("cpu"))]
        self._attention = SelfAttention(
            _HEADS, _KV_HEADS, _DIM, 0, no_norm, AttentionSpec(0, _DIM**-0.5)
        )

    def run(self, ops: Ops[T]) -> T:
        hidden = ops.embed(self._embedding)
        qkv = ops.linear(ops.norm(hidden, self._norm), self._qkv)
        hidden, queries = ops.select_rows(hidden, ops.write(qkv, self._attention))
        update = ops.linear(ops.attend(queries, self._attention), self._output)
        hidden = ops.add(hidden, update, no_norm, 1.0)
        update = ops.mlp(ops.norm(hidden, self._norm), self._mlp)
        hidden = ops.norm(ops.add(hidden, update, no_norm, 1.0), self._norm)
        return ops.logits(hidden, self._head)


def agrees_with_torch(runtime: Runtime) -> bool:
    """Whether the library computes what torch does, up to rounding."""
    exact, sample = _Sample(torch.float32), _Sample(torch.bfloat16)
    tape = record(sample, runtime)
    return all(_agree(exact, sample_tape=tape, block_size=size) for size in _BLOCKS)


def _agree(exact: _Sample, *, sample_tape: Tape, block_size: int) -> bool:
    caches = [_cache(torch.float32, block_size), _cache(torch.bfloat16, block_size)]
    for lens, rows in (([(0, 37)], range(37)), ([(37, 1), (0, 9)], (0, 9))):
        batch = _batch(lens, rows, block_size)
        step = SdpaAttention().prepare(batch, caches[0])
        expected = exact.run(TorchOps(batch, step, exact.ropes))
        logits = torch.empty_like(expected)
        replay_into(sample_tape, batch, PageTables(caches[1]), logits)
        if not (logits - expected).abs().max() < _TOLERANCE * expected.abs().max():
            return False
    return True


def _cache(dtype: torch.dtype, block_size: int) -> KVCache:
    layers = [LayerShape(_KV_HEADS, _DIM, _DIM)]
    return KVCache(layers, 16, block_size, dtype=dtype, device=torch.device("cpu"))


def _batch(work: Sequence[tuple[int, int]], rows: Sequence[int], block_size: int) -> ForwardBatch:
    """Sequences with so many tokens in the cache, and so many more; logits after `rows`."""
    tables = torch.tensor([[3, 1, 8, 5, 9], [2, 7, 0, 0, 0]])[: len(work)]
    positions = [p for before, count in work for p in range(before, before + count)]
    owners = [i for i, (_, count) in enumerate(work) for _ in range(count)]
    slots = [
        int(tables[i, p // block_size]) * block_size + p % block_size
        for i, p in zip(owners, positions, strict=True)
    ]
    queries = Queries(
        block_tables=tables,
        query_lens=tuple(count for _, count in work),
        kv_lens=tuple(before + count for before, count in work),
        num_decodes=sum(count == 1 for _, count in work),
    )
    return ForwardBatch(
        input_ids=torch.arange(len(positions)) * 7 % _VOCAB,
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        queries=queries,
        selected_rows=torch.tensor(rows),
        selected=queries.at(rows),
    )
