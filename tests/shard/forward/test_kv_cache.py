"""What the cache takes of the memory."""

from pathlib import Path

import torch

from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.machine.host_pages import HostPages

CPU = torch.device("cpu")
HUGE_PAGE = 2 << 20


def cache_of(num_blocks: int) -> KVCache:
    layers = [LayerShape(4, 64, 64)] * 2
    pages = HostPages(ahead_share=0.25)
    return KVCache(layers, num_blocks, 32, dtype=torch.bfloat16, device=CPU, pages=pages)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_on_a_cpu_blocks_take_memory_when_they_are_written() -> None:
    cache_of(2).clear([1])  # what torch itself takes at the first time
    before = resident_bytes()
    cache = cache_of(1 << 12)
    assert cache.num_bytes == 256 << 20
    assert resident_bytes() - before < HUGE_PAGE
    cache.clear([1])
    assert resident_bytes() - before < 5 * HUGE_PAGE


def test_on_a_cpu_every_tensor_begins_at_the_border_of_a_huge_page() -> None:
    layers, pages = [LayerShape(3, 64, 32)] * 3, HostPages(ahead_share=0.25)
    cache = KVCache(layers, 100, 32, dtype=torch.bfloat16, device=CPU, pages=pages)
    assert {tensor.data_ptr() % HUGE_PAGE for tensor in (*cache.keys, *cache.values)} == {0}
    assert cache.values[2].shape == (100, 32, 3, 32)
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))


def test_on_a_cpu_a_quarter_of_the_pages_can_be_taken_ahead() -> None:
    cache = cache_of(1 << 12)  # 128 blocks on each of 32 pages
    cache.clear([0])
    before = resident_bytes()
    num_pages = 1
    while cache.take_ahead():
        num_pages += 1

    assert num_pages == 1 + 4 * 8
    after = resident_bytes()
    assert after - before > (4 * 7 - 1) * HUGE_PAGE  # the first had been written to
    cache.clear(range(1024))
    assert resident_bytes() - after < HUGE_PAGE
    assert not any(tensor[:1024].any() for tensor in (*cache.keys, *cache.values))
