"""Free, held, cached."""

import pytest

from kagami_router.scheduler.blocks import BlockAllocator


def counts(allocator: BlockAllocator) -> tuple[int, int, int]:
    return allocator.num_free, allocator.num_held, allocator.num_cached


def test_the_first_block_is_never_given() -> None:
    allocator = BlockAllocator(4)
    assert sorted(allocator.allocate(3)) == [1, 2, 3]


def test_a_shared_block_counts_once_and_is_free_with_its_last_holder() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(1)
    allocator.share(blocks[0])
    allocator.release(blocks)
    assert counts(allocator) == (2, 1, 0)
    allocator.release(blocks)
    assert counts(allocator) == (3, 0, 0)


def test_a_block_put_in_the_cache_stays_until_it_is_evicted_or_shared() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2)
    allocator.put_in_cache(first)
    allocator.put_in_cache(second)
    allocator.release([first, second])
    assert counts(allocator) == (1, 0, 2)
    allocator.share(first)
    allocator.evict(second)
    assert counts(allocator) == (2, 1, 0)
    allocator.check_integrity([[first]], [first])


def test_the_check_finds_a_leak() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(1)
    with pytest.raises(AssertionError):
        allocator.check_integrity([], [])


def test_a_pool_of_the_reserved_block_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        BlockAllocator(1)


def test_blocks_used_before_are_given_again_before_fresh_ones() -> None:
    allocator = BlockAllocator(8)
    blocks = allocator.allocate(3)
    allocator.release(blocks)
    assert sorted(allocator.allocate(3)) == sorted(blocks)
    assert allocator.num_fresh == 4
