"""The KV pool as sequences use it: they take blocks, find a prefix computed, give blocks back.

Ties the allocator to the prefix cache, and owns the block table and the path of every sequence.
Knows nothing of steps, nor of who may run.
"""

from kagami_router.scheduler.blocks import BlockAllocator
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.prefix_cache import BlockKey, Node, PrefixCache
from kagami_router.scheduler.sequence import Sequence

BlockPlace = tuple[Node, BlockKey]
"""A place in the prefix tree, whether its block is there or not: its parent and its key."""


class KVPool:
    """All blocks, and which sequence has which of them."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.prefix_caching = config.prefix_caching
        self._cache_grows_to = config.cache_grows_to
        self._allocator = BlockAllocator(config.num_blocks)
        self._cache = PrefixCache(self._allocator, config.block_size)

    @property
    def num_total(self) -> int:
        """Blocks that sequences can have."""
        return self._allocator.num_total

    @property
    def num_used(self) -> int:
        """Blocks in at least one table, each counted once."""
        return self._allocator.num_held

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache alone: free when somebody needs them."""
        return self._allocator.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be had without taking any from a sequence."""
        return self._allocator.num_free + self._allocator.num_cached

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has made sure that as many are available."""
        allocator, enough = self._allocator, self._cache_grows_to
        shortage = count - allocator.num_free
        if enough is not None:
            of_fresh = shortage + allocator.num_fresh
            shortage = max(shortage, min(of_fresh, allocator.num_cached - enough))
        if shortage > 0:
            self._cache.evict(shortage)
        return allocator.allocate(count)

    def looks_up(self, sequence: Sequence) -> bool:
        """Whether the prefix cache may answer for this sequence."""
        return self.prefix_caching and not sequence.wants_prompt_logprobs

    def match(self, sequence: Sequence) -> list[Node]:
        """The cached beginning of a sequence; its last known token is always computed."""
        if not self.looks_up(sequence):
            return []
        num_known = len(sequence.log.ids)
        return self._cache.match(sequence.prefix, (num_known - 1) // self.block_size)

    def num_missing(self, sequence: Sequence) -> int:
        """How many of the available blocks a waiting sequence takes if it joins."""
        path = self.match(sequence)
        num_shared = sum(self._allocator.is_held(node.block) for node in path)
        return self.blocks_for(len(sequence.log.ids)) - num_shared

    def acquire(self, path: list[Node]) -> list[int]:
        """The blocks of a matched path, for one more table; nobody can evict them now."""
        return self._cache.acquire(path)

    def give_back(self, blocks: list[int], path: list[Node]) -> None:
        """A table lets go of all its blocks; `path` is the part of them that is cached."""
        self._allocator.release(blocks)
        self._cache.release(path)

    def release(self, sequence: Sequence) -> None:
        """Take all its blocks from a sequence."""
        self.give_back(sequence.blocks, sequence.path)
        sequence.blocks = []
        sequence.path = []

    def cache_up_to(self, sequence: Sequence, end: int) -> None:
        """Give the prefix cache the full blocks among the first `end` positions, all confirmed."""
        num_full = end // self.block_size
        self._cache.insert(sequence.path, sequence.prefix, sequence.blocks, num_full)

    def forget(self, path: list[Node]) -> None:
        """Evict a released path as far as nobody else holds or continues it."""
        self._cache.forget(path)

    def being_computed(self, sequence: Sequence) -> BlockPlace | None:
        """The block that a running prefill brings to the prefix cache next."""
        end = (len(sequence.path) + 1) * self.block_size
        if sequence.num_confirmed < end <= sequence.prefill_end:
            return self._place_behind(sequence, sequence.path)
        return None

    def usable_behind(self, sequence: Sequence, path: list[Node]) -> BlockPlace | None:
        """The block behind `path` that a waiting sequence could use if it were cached."""
        has_use = (len(path) + 1) * self.block_size < len(sequence.log.ids)
        if not has_use or not self.looks_up(sequence):
            return None
        return self._place_behind(sequence, path)

    def _place_behind(self, sequence: Sequence, path: list[Node]) -> BlockPlace:
        parent = path[-1] if path else self._cache.root
        return parent, sequence.prefix.block(len(path), self.block_size)

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Assert that the tables of all `sequences`, the tree and the counters agree."""
        self._cache.check_integrity([(each.path, each.blocks) for each in sequences])
        self._allocator.check_integrity(
            (sequence.blocks for sequence in sequences),
            (node.block for node in self._cache.nodes()),
        )
