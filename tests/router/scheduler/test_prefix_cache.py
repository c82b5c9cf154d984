"""The tree of computed blocks."""

from kagami_router.request.prompt import Media
from kagami_router.scheduler.blocks import BlockAllocator
from kagami_router.scheduler.prefix_cache import Node, PrefixCache, PrefixKey

IDS = [1, 2, 3, 4, 5, 6]


class Owner:
    """A sequence's hold on the cache."""

    def __init__(
        self,
        cache: PrefixCache,
        allocator: BlockAllocator,
        ids: list[int],
        adapter: str | None = None,
        media: tuple[Media, ...] = (),
    ) -> None:
        self.cache = cache
        self.allocator = allocator
        self.ids = ids
        self.prefix = PrefixKey(ids, adapter, media)
        self.path: list[Node] = cache.match(self.prefix, (len(ids) - 1) // 2)
        self.num_found = len(self.path)
        self.blocks = cache.acquire(self.path)
        self.blocks += allocator.allocate((len(ids) + 1) // 2 - len(self.blocks))

    def compute(self) -> None:
        self.cache.insert(self.path, self.prefix, self.blocks, len(self.ids) // 2)

    def leave(self) -> None:
        self.allocator.release(self.blocks)
        self.cache.release(self.path)


def new_cache(num_blocks: int = 16) -> tuple[PrefixCache, BlockAllocator]:
    allocator = BlockAllocator(num_blocks)
    return PrefixCache(allocator, 2), allocator


def test_only_what_was_inserted_is_found() -> None:
    cache, allocator = new_cache()
    first = Owner(cache, allocator, IDS)
    assert cache.match(PrefixKey(IDS), 3) == []
    first.compute()
    assert [node.block for node in cache.match(PrefixKey([*IDS, 7]), 9)] == first.blocks
    assert len(cache.match(PrefixKey([1, 2, 9, 9]), 9)) == 1
    assert cache.match(PrefixKey([3, 4]), 9) == []


def test_a_found_block_is_shared_while_its_owner_runs() -> None:
    cache, allocator = new_cache()
    first = Owner(cache, allocator, IDS)
    first.compute()
    second = Owner(cache, allocator, [*IDS[:4], 9, 9])
    assert second.blocks[:2] == first.blocks[:2]
    assert allocator.num_held == 4
    cache.check_integrity([(each.path, each.blocks) for each in (first, second)])


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache, allocator = new_cache()
    for ids in ([1, 2, 3], [4, 5, 6], [1, 2, 7]):
        owner = Owner(cache, allocator, ids)
        owner.compute()
        owner.leave()
    cache.evict(1)
    assert (len(cache.match(PrefixKey([1, 2]), 1)), len(cache.match(PrefixKey([4, 5]), 1))) == (
        1,
        0,
    )


def test_a_held_block_is_not_evicted_and_its_parent_neither() -> None:
    cache, allocator = new_cache()
    owner = Owner(cache, allocator, IDS)
    owner.compute()
    gone = Owner(cache, allocator, [*IDS[:4], 9, 9])
    gone.compute()
    gone.leave()
    cache.evict(allocator.num_cached)
    assert len(cache.match(PrefixKey(IDS), 3)) == 3
    assert allocator.num_cached == 0


def test_a_block_computed_again_takes_the_place_of_an_idle_one() -> None:
    cache, allocator = new_cache()
    first = Owner(cache, allocator, IDS)
    first.compute()
    first.leave()
    second = Owner(cache, allocator, IDS)
    assert second.num_found == 2
    second.compute()
    assert [node.block for node in cache.match(PrefixKey(IDS), 3)] == second.blocks
    assert (allocator.num_held, allocator.num_cached) == (3, 0)
    cache.check_integrity([(second.path, second.blocks)])


def test_a_block_computed_again_stays_outside_while_the_first_is_held() -> None:
    cache, allocator = new_cache()
    first, second = Owner(cache, allocator, IDS), Owner(cache, allocator, IDS)
    first.compute()
    second.compute()
    assert second.path == []
    first.leave()
    second.compute()
    assert len(second.path) == 3
    cache.check_integrity([(second.path, second.blocks)])


def test_a_forgotten_path_is_not_found_but_for_what_others_use() -> None:
    cache, allocator = new_cache()
    first = Owner(cache, allocator, IDS)
    first.compute()
    second = Owner(cache, allocator, [1, 2, 9])
    first.leave()
    cache.forget(first.path)
    assert len(cache.match(PrefixKey(IDS), 3)) == 1
    cache.check_integrity([(second.path, second.blocks)])


def test_a_prefix_used_over_and_over_does_not_pile_up_notes() -> None:
    cache, allocator = new_cache()
    for _ in range(1000):
        owner = Owner(cache, allocator, IDS)
        owner.compute()
        owner.leave()
    assert len(cache._idle_leaves) < 200
    cache.check_integrity([])


def test_another_adapter_shares_no_block_under_equal_ids() -> None:
    cache, allocator = new_cache()
    Owner(cache, allocator, IDS).compute()
    assert Owner(cache, allocator, IDS, "fr").num_found == 0
    Owner(cache, allocator, IDS, "fr").compute()
    assert Owner(cache, allocator, IDS, "fr").num_found == 2
    assert Owner(cache, allocator, IDS, "de").num_found == 0


CAT, DOG = Media(b"cat", 2, 5), Media(b"dog", 2, 5)


def test_another_image_shares_only_what_stands_before_it() -> None:
    cache, allocator = new_cache()
    Owner(cache, allocator, [*IDS, 7], media=(CAT,)).compute()
    assert Owner(cache, allocator, [*IDS, 7], media=(CAT,)).num_found == 3
    assert Owner(cache, allocator, [*IDS, 7], media=(DOG,)).num_found == 1
    assert Owner(cache, allocator, [*IDS, 7]).num_found == 1


def test_a_block_is_keyed_by_the_media_that_overlap_it() -> None:
    key = PrefixKey([*IDS, 7, 8], media=(CAT, Media(b"sound", 5, 6)))
    assert [key.block(index, 2).media for index in range(4)] == [
        (),
        ((b"cat", 2),),
        ((b"cat", 2), (b"sound", 5)),
        (),
    ]
