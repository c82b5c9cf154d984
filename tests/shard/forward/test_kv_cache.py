"""The cache's tensors, and what is done to its blocks."""

import pytest
import torch

from kagami_shard.forward.kv_cache import KVCache, LayerShape, block_bytes, blocks_for
from kagami_shard.machine.host_pages import HostPages

CPU = torch.device("cpu")
HUGE_PAGE = 2 << 20
LAYERS = [LayerShape(3, 64, 32)] * 2


def cache_of(num_blocks: int, pages: HostPages | None = None) -> KVCache:
    return KVCache(LAYERS, num_blocks, 32, dtype=torch.bfloat16, device=CPU, pages=pages)


@pytest.mark.parametrize("has_pages", [False, True])
def test_the_tensors_are_zeros_of_the_layers_shapes(has_pages: bool) -> None:
    cache = cache_of(100, HostPages(0.25) if has_pages else None)
    assert [each.shape for each in cache.keys] == [(100, 32, 3, 64)] * 2
    assert [each.shape for each in cache.values] == [(100, 32, 3, 32)] * 2
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))
    assert cache.num_bytes == 100 * block_bytes(LAYERS, 32, torch.bfloat16)


def test_with_pages_every_tensor_begins_at_the_border_of_one_and_can_be_taken_ahead() -> None:
    cache = cache_of(500, HostPages(0.25))
    assert {tensor.data_ptr() % HUGE_PAGE for tensor in (*cache.keys, *cache.values)} == {0}
    assert cache.take_ahead()


def test_without_pages_there_is_no_memory_to_take_ahead() -> None:
    assert not cache_of(500).take_ahead()


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (32, 1), (33, 2)])
def test_a_block_that_is_begun_counts(num_tokens: int, expected: int) -> None:
    assert blocks_for(num_tokens, 32) == expected


def test_a_token_is_written_to_its_slot() -> None:
    cache = cache_of(4)
    slots = torch.tensor([2 * 32 + 5, 32])
    key, value = torch.ones(2, 3, 64).bfloat16(), torch.full((2, 3, 32), 2.0).bfloat16()
    cache.write(1, slots, key, value)
    assert cache.keys[1][2, 5].eq(1).all()
    assert cache.values[1][1, 0].eq(2).all()
    assert int(cache.keys[1].sum()) == 2 * 3 * 64
    assert not cache.keys[0].any()


def test_blocks_that_are_not_finite_are_counted_and_cleared() -> None:
    cache = cache_of(4)
    cache.keys[0][1, 7, 2, 63] = float("nan")
    cache.values[1][1, 0, 0, 0] = float("inf")
    cache.values[1][2] = 1
    assert cache.num_non_finite([3, 1, 2]).tolist() == [0, 2, 0]
    cache.clear([1])
    assert cache.num_non_finite([1]).tolist() == [0]
    assert cache.values[1][2].all()
