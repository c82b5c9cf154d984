"""Paged attention against a dense computation written the long way."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.batches import FakeSequence, build_batch
from torch import Tensor

from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.layers.attention import AttentionSpec

BLOCK_SIZE = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    group: int
    head_dim: int
    value_dim: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


def dense(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """One sequence, one head and one query at a time; the queries are the last tokens."""
    count, num_heads, _ = query.shape
    group = num_heads // keys.shape[1]
    output = torch.zeros(count, num_heads, values.shape[2])
    for i in range(count):
        position = keys.shape[0] - count + i
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(num_heads):
            seen = slice(first, position + 1)
            scores = keys[seen, head // group] @ query[i, head] * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            weights = scores.exp()
            total = weights.sum()
            if spec.sinks is not None:
                total = total + spec.sinks[head].exp()
            output[i, head] = weights / total @ values[seen, head // group]
    return output


def worst_difference(
    work: list[tuple[int, int]],
    shape: Shape,
    *,
    window: int | None = None,
    softcap: float | None = None,
    with_sinks: bool = False,
    seed: int = 0,
) -> float:
    """Attend for sequences with (computed, new) tokens, singles first; the largest error."""
    generator = torch.Generator().manual_seed(seed)
    work = sorted(work, key=lambda each: each[1] > 1)
    blocks = list(range(1, 1 + sum(-(-sum(each) // BLOCK_SIZE) for each in work)))
    random.Random(seed).shuffle(blocks)
    layer = LayerShape(shape.num_kv_heads, shape.head_dim, shape.value_dim)
    cache = KVCache([layer, layer], len(blocks) + 1, BLOCK_SIZE, dtype=torch.float32, device=CPU)
    sinks = torch.randn(shape.num_heads, generator=generator) if with_sinks else None
    spec = AttentionSpec(1, shape.head_dim**-0.5, window=window, softcap=softcap, sinks=sinks)

    def random_heads(count: int, heads: int, dim: int) -> Tensor:
        return torch.randn(count, heads, dim, generator=generator)

    steps, queries, keys, values = [], [], [], []
    for computed, new in work:
        total = computed + new
        mine = [blocks.pop() for _ in range(-(-total // BLOCK_SIZE))]
        steps.append((FakeSequence([0] * total, mine, computed), new))
        queries.append(random_heads(new, shape.num_heads, shape.head_dim))
        keys.append(random_heads(total, shape.num_kv_heads, shape.head_dim))
        values.append(random_heads(total, shape.num_kv_heads, shape.value_dim))
        slots = torch.tensor([mine[i // BLOCK_SIZE] * BLOCK_SIZE + i % 4 for i in range(computed)])
        cache.write(1, slots.long(), keys[-1][:computed], values[-1][:computed])

    new_keys = torch.cat([k[computed:] for k, (computed, _) in zip(keys, work, strict=True)])
    new_values = torch.cat([v[computed:] for v, (computed, _) in zip(values, work, strict=True)])
    step = SdpaAttention().prepare(build_batch(steps, BLOCK_SIZE), cache)
    ours = step(torch.cat(queries), new_keys, new_values, spec)
    expected = [dense(q, k, v, spec) for q, k, v in zip(queries, keys, values, strict=True)]
    return float((ours - torch.cat(expected)).abs().max())


MIXED = [(5, 1), (0, 1), (13, 1), (0, 7), (6, 5), (4, 4)]
GROUPED = Shape(num_kv_heads=2, group=3, head_dim=8, value_dim=8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"window": 1},
        {"softcap": 1.5},
        {"with_sinks": True},
        {"window": 4, "with_sinks": True},
        {"window": 5, "softcap": 0.7},
    ],
    ids=str,
)
def test_chunks_and_decodes_match_the_dense_computation(options: dict[str, float]) -> None:
    assert worst_difference(MIXED, GROUPED, **options) < 1e-5


@pytest.mark.parametrize("work", [[(9, 1)], [(0, 9)], [(3, 1), (8, 1)], [(3, 6), (0, 2)]], ids=str)
def test_decodes_alone_and_chunks_alone_match(work: list[tuple[int, int]]) -> None:
    assert worst_difference(work, GROUPED) < 1e-5


def test_values_may_be_of_another_size_than_keys() -> None:
    assert worst_difference(MIXED, Shape(2, 2, head_dim=12, value_dim=8)) < 1e-5


@settings(max_examples=60)
@given(
    work=st.lists(st.tuples(st.integers(0, 14), st.integers(1, 9)), min_size=1, max_size=5),
    shape=st.builds(
        Shape,
        num_kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        head_dim=st.sampled_from([4, 8]),
        value_dim=st.sampled_from([4, 8]),
    ),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 5),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_the_dense_computation(
    work: list[tuple[int, int]],
    shape: Shape,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    seed: int,
) -> None:
    error = worst_difference(
        work, shape, window=window, softcap=softcap, with_sinks=with_sinks, seed=seed
    )
    assert error < 1e-5


def test_blocks_of_others_do_not_matter() -> None:
    """A decode reads its own last block to the end: what lies behind its tokens is masked."""
    layer = LayerShape(1, 4, 4)
    results = []
    for garbage in (0.0, 100.0):
        cache = KVCache([layer], 4, BLOCK_SIZE, dtype=torch.float32, device=CPU)
        cache.keys[0].fill_(garbage)
        cache.values[0].fill_(garbage)
        batch = build_batch([(FakeSequence([0, 0], [2]), 2)], BLOCK_SIZE)
        heads = torch.linspace(0, 1, 8).view(2, 1, 4)
        spec = AttentionSpec(0, 0.5)
        SdpaAttention().prepare(batch, cache)(heads, heads, heads, spec)
        last = build_batch([(FakeSequence([0, 0, 0], [2], 2), 1)], BLOCK_SIZE)
        one = heads[:1]
        results.append(SdpaAttention().prepare(last, cache)(one, one, one, spec))
    assert torch.equal(*results)
